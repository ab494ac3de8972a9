"""Formulas of the sigmoid cross-entropy for one label."""

import functools

from keras import ops

from keras_xent.kernels._dtypes import accumulator_dtype, dtype_of
from keras_xent.kernels._labels import is_soft_label
from keras_xent.kernels._logarithms import log1p_polynomial
from keras_xent.kernels._masking import both, multiply_no_nan, nan_unless, where_or_zero


def _log1p(x):
    """`log(1 + x)` for `0 <= x <= 1`: `_xla_cpu.py` has the reason for the polynomial."""
    return log1p_polynomial(x) if dtype_of(x) == "float32" else ops.log1p(x)


def valid_labels(labels, mask, ignore_class):
    """True where a label is present: the mask allows it and it is not `ignore_class`. None where all are."""
    valid = None
    if ignore_class == "nan":
        valid = ops.logical_not(ops.isnan(labels))
    elif ignore_class is not None:
        valid = ops.not_equal(labels, ops.cast(ignore_class, labels.dtype))
    return both(mask, valid)


class Terms:
    """The formulas of one label's loss and gradients, of which XLA computes those that are used.

    With `p = sigma(x)`, `q = sigma(-x)`, positive weight `w`, smoothed label `y`, gamma `g`:

        nll      w y softplus(-x) + (1 - y) softplus(x)
        dnll/dx  (1 - y) p - w y q                    dnll/dy  w softplus(-x) - softplus(x)
        u        y q + (1 - y) p                      du/dx = (1 - 2 y) p q,  du/dy = q - p
        loss     balance u^g nll, with balance = alpha y + (1 - alpha) (1 - y)
        dloss    balance u^g (dnll + g du nll / u), and for y also (2 alpha - 1) u^g nll
    """

    def __init__(self, logits, labels, weight, mask, options):
        dtype = accumulator_dtype(logits)
        self.gamma, self.alpha, self.smoothing = options.focal_gamma, options.focal_alpha, options.label_smoothing
        self.valid = valid_labels(labels, mask, options.ignore_class)
        x, y = (where_or_zero(ops.cast(t, dtype), self.valid) for t in (logits, labels))
        self.is_soft_label = is_soft_label(y)
        self.y = y * (1.0 - self.smoothing) + 0.5 * self.smoothing if self.smoothing else y
        self.weight = weight
        # Branches rather than abs and maximum, whose derivatives at 0 are not those of the sum they are parts of.
        is_nonnegative = x >= 0
        abs_x = ops.where(is_nonnegative, x, -x)
        self._exp_neg_abs = ops.exp(-abs_x)
        self._is_nonnegative = is_nonnegative
        log1p_exp = _log1p(self._exp_neg_abs)
        self.softplus_neg = ops.where(is_nonnegative, 0.0, -x) + log1p_exp
        self.softplus = ops.where(is_nonnegative, x, 0.0) + log1p_exp

    @functools.cached_property
    def _sigmoids(self):
        """`sigma(x)` and `sigma(-x)`, each computed without 1 - the other."""
        sigmoid_abs = 1.0 / (1.0 + self._exp_neg_abs)
        other = self._exp_neg_abs * sigmoid_abs
        return ops.where(self._is_nonnegative, sigmoid_abs, other), ops.where(self._is_nonnegative, other, sigmoid_abs)

    @property
    def p(self):
        return self._sigmoids[0]

    @property
    def q(self):
        return self._sigmoids[1]

    def _nll(self):
        positive = multiply_no_nan(self.weight * self.y, self.softplus_neg)
        return positive + multiply_no_nan(1.0 - self.y, self.softplus)

    def _balanced(self, value):
        if self.alpha is None:
            return value
        return multiply_no_nan(self.y * self.alpha + (1.0 - self.y) * (1.0 - self.alpha), value)

    def _focal(self):
        """`u^g`, and `nll / u`, which stays finite where both tend to 0."""
        # The power of 0 is not computed: its derivative is infinite for gamma < 1.
        u = self.y * self.q + (1.0 - self.y) * self.p
        positive = u > 0
        safe_u = ops.where(positive, u, ops.ones((), u.dtype))
        ratio = where_or_zero(self._nll() / safe_u, positive)
        return ops.where(positive, safe_u**self.gamma, u), ratio

    def loss(self):
        loss = self._nll()
        if self.gamma:
            loss = self._focal()[0] * loss
        return self._where_valid(self._balanced(loss))

    def _where_valid(self, value):
        """0 for missing labels, NaN for those out of range, which no error could be raised for."""
        return where_or_zero(nan_unless(self.is_soft_label, value), self.valid)

    def logits_gradient(self):
        slope = (1.0 - self.y) * self.p - self.weight * self.y * self.q
        if self.gamma:
            factor, ratio = self._focal()
            du_dx = (1.0 - 2.0 * self.y) * self.p * self.q
            slope = factor * (slope + self.gamma * multiply_no_nan(du_dx, ratio))
        return self._where_valid(self._balanced(slope))

    def labels_gradient(self):
        nll, slope = self._nll(), self.weight * self.softplus_neg - self.softplus
        factor = 1.0
        if self.gamma:
            factor, ratio = self._focal()
            slope = factor * (slope + self.gamma * multiply_no_nan(self.q - self.p, ratio))
        slope = self._balanced(slope)
        if self.alpha is not None:
            slope = slope + multiply_no_nan(2.0 * self.alpha - 1.0, factor * nll)
        return self._where_valid(multiply_no_nan(1.0 - self.smoothing, slope))
