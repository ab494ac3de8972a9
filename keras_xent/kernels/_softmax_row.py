"""Formulas of the softmax cross-entropies for one row of logits.

With logits `x` (after the soft cap), `p = softmax(x)`, `lse = log sum exp x`, smoothed and weighted targets `a_c` and
`A = sum_c a_c`, each of these losses is `sum_c a_c (lse - x_c)` with gradient `A p - a`. Of each row two numbers are
kept, the residuals: `max_logit`, before the cap, and `sum_exp_minus_one = sum_c exp(x_c - max_logit) - 1`.

`sum_exp_minus_one` rather than the sum itself keeps confident rows right: with all but 1e-9 of the probability on the
target, the sum rounds to 1 in float32 and its logarithm, the loss, to 0. The 1 is therefore subtracted inside the sum,
from the very term it comes from: the label's, or that of the largest logit, whose `exp(x - max_logit)` is exactly 1.

All arrays have the class axis second, and one column where they hold a number per row.
"""

from collections.abc import Callable
from typing import Any

from keras import ops

from keras_xent._backend import take_at_columns, tanh
from keras_xent._types import Tensor
from keras_xent.kernels._dtypes import accumulator_dtype, is_finite, largest, upcast
from keras_xent.kernels._logarithms import log1p
from keras_xent.kernels._masking import multiply_no_nan, nan_unless, where_or_zero
from keras_xent.kernels._options import SoftmaxOptions
from keras_xent.kernels._xla_cpu import cast_to_nearest_even, row_max, row_sum, sums_short_rows


def apply_softcap(logits: Tensor, softcap: float | None) -> Tensor:
    """The upcast logits, capped."""
    x = upcast(logits)
    return x if softcap is None else softcap * tanh(x / softcap)


def max_of_logits(logits: Tensor) -> Tensor:
    """The largest logit of each row, before the cap."""
    # No result depends on what is subtracted from all logits, so it is a constant to every derivative. The maximum's
    # own derivative would be divided among logits that are equally large.
    return ops.stop_gradient(row_max(upcast, logits))


def _clip_to_finite(max_logit):
    # With a logit of +inf, all others are infinitely far below: exp(x - largest number) is 0 for them.
    return ops.minimum(max_logit, largest(max_logit))


def is_positive_infinity(x: Tensor) -> Tensor:
    """True for +inf; compared with no infinity, which would alarm those who look for one."""
    return x > largest(x)


def with_infinite_logits(sum_exp_minus_one: Tensor, max_logit: Tensor, softcap: float | None) -> Tensor:
    """`sum_exp_minus_one`, right where logits are infinite.

    One logit of +inf has all the probability. Two have no limit, nor has a row of only -inf: NaN.
    """
    if softcap is not None:
        return sum_exp_minus_one
    # Of a row with a logit of +inf, the sum has counted these logits, less one.
    infinite = is_positive_infinity(max_logit)
    several = ops.logical_and(infinite, sum_exp_minus_one > 0.5)
    return nan_unless(ops.logical_not(several), ops.where(infinite, 0.0 * sum_exp_minus_one, sum_exp_minus_one))


def max_minus_logit(x: Tensor, max_logit: Tensor, softcap: float | None) -> Tensor:
    """`max_logit - x`, both capped here; 0 for the largest logit itself, even an infinite one."""
    difference = apply_softcap(max_logit, softcap) - apply_softcap(x, softcap)
    if softcap is None:
        return where_or_zero(difference, ops.logical_or(ops.not_equal(x, max_logit), is_finite(max_logit)))
    return ops.where(ops.equal(x, max_logit), difference - ops.stop_gradient(difference), difference)


def shifted_logits(x, max_logit, softcap):
    """`x - max_logit`, both capped here, and never above 0: exactly 0 for the largest logit, even an infinite one."""
    shifted = -max_minus_logit(x, max_logit, softcap) if softcap is not None else x - _clip_to_finite(max_logit)
    # Not a minimum, here and below: of equals, JAX divides the derivative, and of NaN and a number XLA:CPU may take
    # the number.
    return where_or_zero(shifted, ops.logical_not(shifted > 0))


def exp_shifted(logits: Tensor, max_logit: Tensor, softcap: float | None) -> Tensor:
    """`exp(x - max_logit)`, at most 1: also for a logit of +inf, so that the sum over a row counts these."""
    return ops.exp(shifted_logits(upcast(logits), max_logit, softcap))


def sum_exp_minus_one(logits: Tensor, max_logit: Tensor, softcap: float | None) -> Tensor:
    """`sum_c exp(x_c - max_logit) - 1`, whose 1 is subtracted inside the sum where that keeps digits."""

    def is_largest(logits):
        return ops.cast(upcast(logits) >= max_logit, max_logit.dtype)

    def without_largest(logits):
        # Not selected: the derivative of the largest is kept, and an exponential that is used twice is in memory.
        return exp_shifted(logits, max_logit, softcap) - is_largest(logits)

    if sums_short_rows(logits):
        # Less what is 0 for one largest: XLA takes a product that is added to something out of its fusion.
        return row_sum(without_largest, logits) - (1.0 - row_sum(is_largest, logits))

    def minus_largest(logits):
        exp = exp_shifted(logits, max_logit, softcap)
        return ops.where(exp >= 1.0, exp - 1.0, exp)

    # Two sums of what is in memory: one that compares inside takes longer (XLA:CPU).
    sum_exp = row_sum(lambda x: exp_shifted(x, max_logit, softcap), logits)
    return subtract_one(sum_exp, row_sum(minus_largest, logits))


def subtract_one(sum_exp: Tensor, without_largest: Tensor) -> Tensor:
    """`sum_exp - 1`, of two sums of a row: of `exp_shifted`, and of the same with 1 subtracted from what is 1.

    Above 1.5 the difference loses no digits; below, one term alone is 1.
    """
    return ops.where(sum_exp < 1.5, without_largest, sum_exp - 1.0)


def nll(x: Tensor, max_logit: Tensor, sum_exp_minus_one: Tensor, softcap: float | None) -> Tensor:
    """`lse - x` for some logits of each row."""
    return max_minus_logit(upcast(x), max_logit, softcap) + log1p(sum_exp_minus_one)


def focal(nll: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """The focal factor `u^gamma` of a class, and the factor that the gradient has in place of 1.

    With `u = 1 - p` and `p = exp(-nll)`, the latter is `u^gamma (1 + gamma p nll / u)`. The quotient `nll / u` tends to
    1 where `u` tends to 0, which is where computing `u^(gamma - 1)` gives NaN for gamma < 1.
    """
    p = ops.exp(-nll)
    u = ops.maximum(-ops.expm1(-nll), 0.0)
    # The power of 0 is not computed: its derivative is infinite for gamma < 1.
    positive = u > 0
    one = ops.ones((), u.dtype)
    safe_u = ops.where(positive, u, one)
    ratio = ops.where(positive, nll / safe_u, one)
    factor = ops.where(positive, safe_u**gamma, u)
    return factor, factor * (1.0 + gamma * ops.where(p > 0, p * ratio, 0.0))


def sum_of_losses(
    target: Callable,
    target_sum: Tensor,
    logits: Tensor,
    arrays: tuple[Tensor, ...],
    max_logit: Tensor,
    sum_exp_minus_one: Tensor,
    options: SoftmaxOptions,
) -> Tensor:
    """`sum_c a_c nll_c`, with focal factors if asked; `target(*arrays)` gives `a_c` and `target_sum` its sum."""
    log_sum_exp_shifted = log1p(sum_exp_minus_one)

    def term(logits, *arrays):
        loss = max_minus_logit(upcast(logits), max_logit, options.logit_softcap)
        if options.focal_gamma:
            loss = loss + log_sum_exp_shifted
            loss = loss * focal(loss, options.focal_gamma)[0]
        return multiply_no_nan(target(*arrays), loss)

    loss = row_sum(term, logits, *arrays)
    return loss if options.focal_gamma else loss + multiply_no_nan(target_sum, log_sum_exp_shifted)


def log_sum_exp(max_logit: Tensor, sum_exp_minus_one: Tensor, softcap: float | None) -> Tensor:
    """`lse` of each row."""
    return apply_softcap(max_logit, softcap) + log1p(sum_exp_minus_one)


def plus_z_loss(loss: Tensor, max_logit: Tensor, sum_exp_minus_one: Tensor, options: SoftmaxOptions) -> Tensor:
    """`loss + z lse^2`."""
    if not options.z_loss:
        return loss
    return loss + options.z_loss * ops.square(log_sum_exp(max_logit, sum_exp_minus_one, options.logit_softcap))


def z_loss_slope(max_logit: Tensor, sum_exp_minus_one: Tensor, options: SoftmaxOptions) -> Any:
    """`2 z lse`, which times `p` is the z-loss' part of the gradient."""
    if not options.z_loss:
        return 0.0
    return 2.0 * options.z_loss * log_sum_exp(max_logit, sum_exp_minus_one, options.logit_softcap)


def logits_gradient(
    upstream: Tensor,
    dead_rows: Tensor,
    logits: Tensor,
    target: Tensor,
    target_sum: Tensor,
    max_logit: Tensor,
    sum_exp_minus_one: Tensor,
    options: SoftmaxOptions,
    shifted: Tensor = None,
) -> Tensor:
    """`upstream (B p - a)`. `target` is `a`, of the shape of the logits: it is fused, and never in memory.

    `shifted` is `exp_shifted`, where it is still in memory.
    """
    x, softcap = upcast(logits), options.logit_softcap
    if options.focal_gamma:
        class_nll = max_minus_logit(x, max_logit, softcap) + log1p(sum_exp_minus_one)
        target = target * focal(class_nll, options.focal_gamma)[1]
        target_sum = ops.sum(target, axis=1, keepdims=True)
    z_slope = z_loss_slope(max_logit, sum_exp_minus_one, options)
    sum_exp = 1.0 + sum_exp_minus_one
    # p of the largest logit is 1 - s / (1 + s) with s = sum_exp_minus_one; a is subtracted before anything passes
    # through a p rounded to 1, and the z-loss is added after. Its exp_shifted is 1, and has the derivative. Below 1/2
    # p itself is the more accurate: of a flat distribution it is 1 / C, and the difference is rounded as 1 is.
    shifted = exp_shifted(logits, max_logit, softcap) if shifted is None else shifted
    at_max = (target_sum - target) + ((shifted - 1.0) - sum_exp_minus_one) * (target_sum / sum_exp)
    if options.z_loss:
        at_max = at_max + shifted * (z_slope / sum_exp)
    off_max = shifted * ((target_sum + z_slope) / sum_exp) - target
    is_likely = ops.logical_and(ops.equal(x, max_logit), sum_exp_minus_one < 1.0)
    gradient = upstream * ops.where(is_likely, at_max, off_max)
    return to_logits_dtype(gradient, dead_rows, logits, softcap)


def to_logits_dtype(gradient: Tensor, dead_rows: Tensor, logits: Tensor, softcap: float | None) -> Tensor:
    """The gradient for the logits before the cap, in their dtype."""
    # Selected before it is rounded: XLA:CPU selects 16-bit floats by way of float32, and would round them twice.
    (gradient,) = zero_rows(dead_rows, gradient)
    if softcap is not None:
        # The cap's slope 1 - tanh^2, without the difference, which is all rounding where the cap is reached.
        e = ops.exp(-2.0 * ops.abs(upcast(logits) / softcap))
        gradient = gradient * (4.0 * e / ops.square(1.0 + e))
    return cast_to_nearest_even(gradient, logits.dtype)


def is_dead_row(upstream: Tensor, *of_row: Tensor) -> Tensor:
    """True for rows without a gradient (NaN, label out of range) whose upstream gradient is 0: they leave no trace.

    A row without a gradient is known by one of the numbers `of_row`, which is infinite or NaN.

    Other rows are not selected by their upstream gradient of 0: the derivative with respect to it is their gradient.
    """
    return ops.logical_and(ops.equal(upstream, 0.0), ops.logical_not(is_finite(sum(of_row))))


def zero_rows(rows: Tensor, *arrays: Tensor) -> tuple[Tensor, ...]:
    """The arrays, 0 in these rows; what is computed from them there, derivatives included, is a number."""
    return tuple(where_or_zero(array, ops.logical_not(rows)) for array in arrays)


def num_classes_of(logits: Tensor) -> Tensor:
    """The number of classes, as a float: it can be a divisor where it is not known before the program runs."""
    number = logits.shape[1]
    if isinstance(number, int) and number:
        return float(number)
    return ops.cast(ops.shape(logits)[1], accumulator_dtype(logits))


def class_ids(logits: Tensor, dtype: str = "int32") -> Tensor:
    """0, 1, ..., C - 1, in a shape that broadcasts against the logits."""
    return ops.reshape(ops.arange(ops.shape(logits)[1], dtype=dtype), (1, -1) + (1,) * (len(logits.shape) - 2))


def rank_of_label(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the rank of the label: the number of classes with larger logits, or equal ones of a smaller index.

    NaN for labels below 0.
    """
    label = ops.maximum(labels, 0)
    label_logit = upcast(take_at_columns(logits, label))

    def is_ahead(logits, ids):
        # Negated, so that NaN is ahead too.
        x = upcast(logits)
        behind = ops.where(ids < label, x < label_logit, x <= label_logit)
        return ops.cast(ops.logical_not(behind), x.dtype)

    return nan_unless(labels >= 0, row_sum(is_ahead, logits, class_ids(logits)))
