"""Softmax cross-entropy of sparse labels or of distributions over the classes.

With logits `x` (after the soft cap), `p = softmax(x)`, `lse = log sum exp x`, smoothed and weighted targets `a_c` and
`A = sum_c a_c`, every loss here is `sum_c a_c (lse - x_c)` with gradient `A p - a`. One body computes both kernels; it
keeps three numbers of each row: the largest logit `top`, `excess = sum_c exp(x_c - top) - 1`, and `A`.

`excess` rather than the sum itself is what keeps confident rows right: with all but 1e-9 of the probability on the
target, the sum rounds to 1 in float32 and its logarithm, the loss, to 0. The 1 is therefore taken off inside the sum,
from the very term it comes from: the target's.
"""

from typing import Any

import keras
from keras import ops

from keras_xent.kernels import targets as _targets
from keras_xent.kernels._compile import as_written, compiled, compiled_by_rows, differentiable, row_max, row_sum


@as_written
def sparse_softmax_cross_entropy(
    labels: Any,
    logits: Any,
    *,
    axis: int = -1,
    mask: Any = None,
    ignore_class: int | None = None,
    label_smoothing: float = 0.0,
    class_weight: Any = None,
    focal_gamma: float = 0.0,
    z_loss: float = 0.0,
    logit_softcap: float | None = None,
) -> Any:
    """Cross-entropy of integer labels under the softmax of the logits, one value for each label.

    For classification with one class out of many, and for next-token prediction. Neither the one-hot labels nor the
    probabilities are made in memory; the forward pass allocates nothing of the logits' size.

    Formula, for label `k`, smoothing `s`, class weights `w`, `nll_c = lse - x_c`:
    `(1 - s) w_k nll_k + (s / C) sum_c w_c nll_c + z lse^2`, each `nll_c` times `(1 - p_c)^gamma` if focal.

    Equivalent to (without options):

        log_p = keras.ops.log_softmax(logits, axis=-1)
        loss = -keras.ops.take_along_axis(log_p, labels[..., None], axis=-1)[..., 0]

    Args:
        labels: integers `[...]`, the shape of `logits` without the class axis. Never cast to a float type.
        logits: `[..., C]` (or `C` at `axis`), bfloat16, float16, float32 or float64, read in their own dtype.
        axis: the class axis.
        mask: booleans of the shape of `labels`; False entries give loss 0 and gradient 0 whatever lies under them.
        ignore_class: a label that is masked in the same way.
        label_smoothing: share `s` in [0, 1] of the target spread evenly over all classes.
        class_weight: one weight per class, `[C]`, or a dict from class to weight (others 1).
        focal_gamma: exponent of the focal factor `(1 - p)^gamma`; 0 is plain cross-entropy.
        z_loss: weight of `lse^2`, which keeps logits from drifting. Not class-weighted.
        logit_softcap: `c` of `c tanh(x / c)`, applied to the logits first.

    Returns:
        Losses in nats, of the shape of `labels`, float32 (float64 for float64 logits). A label that is no class, where
        it cannot be reported, gives NaN in the loss and in the gradient of its row.

    Raises:
        ValueError: shapes that do not fit; in eager mode, a label that is no class.
        InvalidArgumentError: the same in a TensorFlow graph on the CPU.

    Example:

    >>> import numpy as np
    >>> import keras_xent as kx
    >>> logits = np.log([[0.2, 0.7, 0.1], [0.2, 0.7, 0.1]]).astype("float32")
    >>> loss = kx.kernels.sparse_softmax_cross_entropy(np.array([1, 2]), logits)
    >>> [round(float(x), 4) for x in loss]  # -ln 0.7 and -ln 0.1
    [0.3567, 2.3026]

    References: label smoothing, arXiv:1512.00567; focal factor, arXiv:1708.02002; z-loss, arXiv:2204.02311 (section 5);
    weights with smoothing as in PyTorch's `cross_entropy`; soft cap, arXiv:2408.00118.
    """
    labels, logits = _targets.to_tensor(labels), _floating(logits)
    rank = len(logits.shape)
    axis = _targets.checked_axis(axis, rank)
    labels = _targets.without_class_axis(labels, logits, axis)
    mask = None if mask is None else _targets.to_tensor(mask)
    valid = _targets.counted(labels, mask, ignore_class)
    num_classes = ops.shape(logits)[axis]
    indices = _targets.class_indices(labels, num_classes, valid)
    rows = _targets.as_rows(logits, axis)
    loss = _sparse(
        rows,
        _targets.along_rows(indices, axis, rank),
        *_optional_class_weights(class_weight, num_classes, logits, len(rows.shape)),
        smoothing=float(label_smoothing),
        gamma=float(focal_gamma),
        z_loss=float(z_loss),
        softcap=None if logit_softcap is None else float(logit_softcap),
    )
    return _selected(ops.reshape(loss, ops.shape(labels)), valid)


@as_written
def softmax_cross_entropy(
    targets: Any,
    logits: Any,
    *,
    axis: int = -1,
    mask: Any = None,
    label_smoothing: float = 0.0,
    class_weight: Any = None,
    focal_gamma: float = 0.0,
    z_loss: float = 0.0,
    logit_softcap: float | None = None,
) -> Any:
    """Cross-entropy between target distributions and the softmax of the logits, one value for each distribution.

    For one-hot targets, mixed-up labels and distillation from a teacher. Rows of `targets` need not sum to 1; an
    all-zero row has loss 0 and gradient 0. Targets get a gradient too, if something asks for it.

    Formula, for targets `q`, `q' = q (1 - s) + s / C`, class weights `w`: `sum_c w_c q'_c (lse - x_c) + z lse^2`, each
    term of the sum times `(1 - p_c)^gamma` if focal.

    Equivalent to (without options):

        loss = -keras.ops.sum(targets * keras.ops.log_softmax(logits, axis=-1), axis=-1)

    Args:
        targets: `[..., C]`, of the shape of `logits`, any numeric dtype.
        logits: `[..., C]` (or `C` at `axis`), bfloat16, float16, float32 or float64, read in their own dtype.
        axis, mask, label_smoothing, class_weight, focal_gamma, z_loss, logit_softcap: as in
            `sparse_softmax_cross_entropy`; `mask` has the shape of the result.

    Returns:
        Losses in nats, of the shape of `logits` without the class axis, float32 (float64 for float64 logits).

    Raises:
        ValueError: shapes that do not fit.

    Example:

    >>> import numpy as np
    >>> import keras_xent as kx
    >>> targets = np.array([[0.0, 1.0, 0.0], [0.5, 0.5, 0.0]], "float32")
    >>> logits = np.log([[0.2, 0.7, 0.1], [0.2, 0.7, 0.1]]).astype("float32")
    >>> [round(float(x), 4) for x in kx.kernels.softmax_cross_entropy(targets, logits)]
    [0.3567, 0.9831]

    References: as in `sparse_softmax_cross_entropy`; the gradient for rows that do not sum to 1 is `A p - q`, where
    TensorFlow's op has `p - q`.
    """
    targets, logits = _targets.to_tensor(targets), _floating(logits)
    rank = len(logits.shape)
    axis = _targets.checked_axis(axis, rank)
    if not _targets.same_shape(targets.shape, logits.shape):
        raise ValueError(
            "`targets` and `logits` must have the same shape. "
            f"Received: targets of shape {tuple(targets.shape)} and logits of shape {tuple(logits.shape)}. "
            "For integer labels use the sparse loss."
        )
    shape = tuple(size for i, size in enumerate(ops.shape(logits)) if i != axis)
    learned = _targets.is_float(targets)
    if not learned:
        targets = ops.cast(targets, _targets.accumulator_dtype(logits))
    rows, target_rows = _targets.as_rows(logits, axis), _targets.as_rows(targets, axis)
    weights = _optional_class_weights(class_weight, ops.shape(logits)[axis], logits, len(rows.shape))
    options = {
        "smoothing": float(label_smoothing),
        "gamma": float(focal_gamma),
        "softcap": None if logit_softcap is None else float(logit_softcap),
    }
    loss = _dense(rows, target_rows, *weights, z_loss=float(z_loss), **options)
    if learned:
        loss = loss + _for_targets(target_rows, rows, *weights, **options)
    valid = None if mask is None else ops.cast(_targets.to_tensor(mask), "bool")
    return _selected(ops.reshape(loss, shape), valid)


def _floating(logits):
    logits = _targets.to_tensor(logits)
    return logits if _targets.is_float(logits) else ops.cast(logits, "float32")


def _optional_class_weights(class_weight, num_classes, logits, rank):
    if class_weight is None:
        return ()
    return (_targets.class_weights(class_weight, num_classes, _targets.accumulator_dtype(logits), rank),)


def _selected(loss, valid):
    # Mask last: whatever a masked row holds, NaN included, it is not selected. The backward pass sees an upstream
    # gradient of exactly 0 there and selects in the same way.
    return loss if valid is None else ops.where(valid, loss, ops.zeros_like(loss))


# What both kernels compute. All arrays have the class axis second, and one column where they hold a number per row.


def _accurate(logits):
    return ops.cast(logits, _targets.accumulator_dtype(logits))


def _capped(logits, softcap):
    x = _accurate(logits)
    return x if softcap is None else softcap * ops.tanh(x / softcap)


def _top(logits, softcap):
    # The cap is monotonic, so the largest capped logit is the cap of the largest.
    top = row_max(_accurate, logits)
    return top if softcap is None else softcap * ops.tanh(top / softcap)


def _finite(top):
    # With a logit of +inf, all others are infinitely far below: exp(x - largest number) is 0 for them.
    return ops.minimum(top, _targets.largest(top))


def _infinite_logits(logits, top):
    """How many logits of each row are +inf. Costs nothing where there are none."""
    infinite = ops.equal(top, float("inf"))
    return ops.cond(
        ops.any(infinite),
        lambda: ops.sum(ops.cast(ops.equal(_accurate(logits), float("inf")), top.dtype), axis=1, keepdims=True),
        lambda: ops.zeros_like(top),
    )


def _with_infinities(excess, logits, top, softcap):
    # One logit of +inf has all the probability. Two have no limit, nor has a row of only -inf: NaN.
    if softcap is not None:
        return excess
    infinite = _infinite_logits(logits, top)
    excess = ops.where(infinite == 1, ops.zeros_like(excess), excess)
    return ops.where(infinite > 1, ops.full_like(excess, float("nan")), excess)


def _gap(x, top):
    # top - x, and 0 for the top itself even where it is infinite.
    return ops.where(ops.equal(x, top), ops.zeros_like(x), top - x)


def _focal(nll, gamma):
    """The focal factor `u^gamma` of a class, and the slope that the gradient has in place of 1.

    With `u = 1 - p` and `p = exp(-nll)`, the slope is `u^gamma (1 + gamma p nll / u)`. The quotient `nll / u` tends to
    1 where `u` tends to 0, which is where computing `u^(gamma - 1)` gives NaN for gamma < 1.
    """
    p = ops.exp(-nll)
    u = ops.maximum(-ops.expm1(-nll), 0.0)
    ratio = ops.where(u > 0, nll / ops.where(u > 0, u, 1.0), 1.0)
    factor = u**gamma
    return factor, factor * (1.0 + gamma * ops.where(p > 0, p * ratio, 0.0))


def _sum_of_losses(weight, total, logits, arrays, top, excess, *, gamma, softcap):
    """`sum_c a_c nll_c`, focal if asked; `weight(logits, *arrays)` gives `a_c` and `total` its sum over the row."""
    common = ops.log1p(excess)

    def term(logits, *arrays):
        a = weight(logits, *arrays)
        loss = _gap(_capped(logits, softcap), top)
        if gamma:
            loss = loss + common
            loss = loss * _focal(loss, gamma)[0]
        # 0 times an infinite loss is 0.
        return ops.where(ops.equal(a, 0.0), ops.zeros_like(loss), a * loss)

    loss = row_sum(term, logits, *arrays)
    return loss if gamma else loss + ops.where(ops.equal(total, 0.0), ops.zeros_like(loss), total * common)


def _plus_z_loss(loss, top, excess, z_loss):
    return loss + z_loss * ops.square(top + ops.log1p(excess)) if z_loss else loss


def _gradient(upstream, logits, a, total, top, excess, *, gamma, z_loss, softcap):
    """`upstream (B p - a)`, with `B = A + 2 z lse`. `a` has the shape of the logits, is fused, and never in memory."""
    x = _capped(logits, softcap)
    common = ops.log1p(excess)
    if gamma:
        a = a * _focal(_gap(x, top) + common, gamma)[1]
        total = ops.sum(a, axis=1, keepdims=True)
    slope = total + 2.0 * z_loss * (top + common) if z_loss else total
    share = slope / (1.0 + excess)
    # p of the top is 1 - excess / (1 + excess); a is taken off before anything passes through a p rounded to 1.
    at_top = (total - a) + (slope - total) - excess * share
    elsewhere = ops.exp(ops.minimum(x - _finite(top), 0.0)) * share - a
    gradient = upstream * ops.where(ops.equal(x, top), at_top, elsewhere)
    return _finished(gradient, upstream, x, logits, softcap)


def _finished(gradient, upstream, x, logits, softcap):
    if softcap is not None:
        gradient = gradient * (1.0 - ops.square(x / softcap))
    # Rows that nobody asked for are selected away, so that NaN in them goes nowhere.
    gradient = ops.where(ops.equal(upstream, 0.0), ops.zeros_like(gradient), gradient)
    return ops.cast(gradient, logits.dtype)


# Sparse labels.


# Without smoothing all terms of the row's sum are simple, and slices beat blocks on TensorFlow.
@compiled_by_rows(outputs=3, blocked=lambda *, smoothing, **others: keras.backend.backend() == "jax" or smoothing > 0)
def _sparse_forward(logits, labels, class_weight=None, *, smoothing, gamma, z_loss, softcap):
    num_classes = _number_of_classes(logits)
    is_class = labels >= 0
    label = ops.maximum(labels, 0)
    top = _top(logits, softcap)
    at_label = _capped(ops.take_along_axis(logits, label, axis=1), softcap)

    def others(logits, classes):
        mass = ops.exp(_capped(logits, softcap) - _finite(top))
        return ops.where(ops.equal(classes, label), ops.zeros_like(mass), mass)

    excess = row_sum(others, logits, _classes(logits)) + ops.expm1(ops.minimum(at_label - _finite(top), 0.0))
    excess = _with_infinities(excess, logits, top, softcap)
    excess = ops.where(is_class, excess, ops.full_like(excess, float("nan")))

    weights = ops.ones_like(_classes(logits, top.dtype)) if class_weight is None else class_weight
    label_weight = 1.0 if class_weight is None else ops.take(ops.reshape(class_weight, (-1,)), label)
    nll = _gap(at_label, top) + ops.log1p(excess)
    if gamma:
        nll = nll * _focal(nll, gamma)[0]
    loss = _times(label_weight, nll)
    if smoothing:
        spread = _sum_of_losses(
            lambda logits, weights: weights + ops.zeros_like(_accurate(logits)),
            ops.sum(weights),
            logits,
            (weights,),
            top,
            excess,
            gamma=gamma,
            softcap=softcap,
        )
        loss = _times(1.0 - smoothing, loss) + smoothing / num_classes * spread
    return _plus_z_loss(loss, top, excess, z_loss), (top, excess)


@compiled
def _sparse_backward(upstream, saved, logits, labels, class_weight=None, *, smoothing, gamma, z_loss, softcap):
    top, excess = saved
    is_label = ops.equal(_classes(logits), labels)
    weights = 1.0 if class_weight is None else class_weight
    spread = smoothing / _number_of_classes(logits) * weights if smoothing else 0.0
    label = ops.maximum(labels, 0)
    label_weight = 1.0 if class_weight is None else ops.take(ops.reshape(class_weight, (-1,)), label)
    total = (1.0 - smoothing) * label_weight * ops.ones_like(top)
    if smoothing:
        total = total + smoothing * (1.0 if class_weight is None else ops.mean(class_weight))
    if gamma and smoothing:
        a = ops.where(is_label, (1.0 - smoothing) * weights, ops.zeros((), top.dtype)) + spread
        return _gradient(upstream, logits, a, total, top, excess, gamma=gamma, z_loss=z_loss, softcap=softcap)

    # Only the label's own gradient needs care, and that is one number for each row: 1 - p comes from the loss, which
    # is exact where p has rounded to 1.
    common = ops.log1p(excess)
    nll = _gap(_capped(ops.take_along_axis(logits, label, axis=1), softcap), top) + common
    target = (1.0 - smoothing) * label_weight
    if smoothing:
        target = target + smoothing / _number_of_classes(logits) * label_weight
    if gamma:
        target = total = total * _focal(nll, gamma)[1]
    slope = total + 2.0 * z_loss * (top + common) if z_loss else total
    at_label = upstream * ((total - target) + (slope - total) + slope * ops.expm1(-nll))
    share = upstream * slope / (1.0 + excess)
    x = _capped(logits, softcap)
    elsewhere = ops.exp(ops.minimum(x - _finite(top), 0.0)) * share
    if smoothing:
        elsewhere = elsewhere - upstream * spread
    return _finished(ops.where(is_label, at_label, elsewhere), upstream, x, logits, softcap)


_sparse = differentiable(_sparse_forward, _sparse_backward)


def _number_of_classes(logits):
    # A float, so that it can be a divisor where the number is not known before the program runs.
    return ops.cast(ops.shape(logits)[1], _targets.accumulator_dtype(logits))


def _classes(logits, dtype="int32"):
    return ops.reshape(ops.arange(ops.shape(logits)[1], dtype=dtype), (1, -1) + (1,) * (len(logits.shape) - 2))


def _times(weight, loss):
    return ops.where(ops.equal(weight, 0.0), ops.zeros_like(loss), weight * loss)


# Distributions.


def _smoothed(targets, class_weight, some, dtype, smoothing):
    """`a_c = w_c q'_c`; `some` is 0 for an all-zero row, which smoothing must not turn into a target."""
    a = ops.cast(targets, dtype)
    if smoothing:
        a = a * (1.0 - smoothing) + smoothing * some
    return a if class_weight is None else a * class_weight


def _totals(targets, logits, class_weight, smoothing):
    """`sum_c q_c`, `A = sum_c a_c`, and `1 / C` (0 where the row of targets is all zeros)."""
    dtype = _targets.accumulator_dtype(logits)
    num_classes = _number_of_classes(logits)
    mass = row_sum(lambda q: ops.cast(q, dtype), targets)
    some = ops.where(ops.equal(mass, 0.0), ops.zeros_like(mass), ops.ones_like(mass) / num_classes)
    if class_weight is None:
        total = mass * (1.0 - smoothing) + smoothing * some * num_classes if smoothing else mass
    else:
        total = row_sum(lambda q, w: _smoothed(q, w, some, dtype, smoothing), targets, class_weight)
    return mass, total, some


@compiled_by_rows(outputs=5, blocked=lambda **static: True)
def _dense_forward(logits, targets, class_weight=None, *, smoothing, gamma, z_loss, softcap):
    mass, total, some = _totals(targets, logits, class_weight, smoothing)
    top = _top(logits, softcap)
    # The targets say where the 1 of `excess` is to be taken off: all of it from the label of a one-hot row.
    scale = 1.0 / ops.maximum(mass, 1.0)

    def others(logits, targets):
        mass = ops.exp(_capped(logits, softcap) - _finite(top))
        return mass - ops.cast(targets, mass.dtype) * scale

    excess = row_sum(others, logits, targets) + (mass * scale - 1.0)
    excess = _with_infinities(excess, logits, top, softcap)
    arrays = (targets,) if class_weight is None else (targets, class_weight)
    loss = _sum_of_losses(
        lambda logits, q, w=None: _smoothed(q, w, some, top.dtype, smoothing),
        total,
        logits,
        arrays,
        top,
        excess,
        gamma=gamma,
        softcap=softcap,
    )
    return _plus_z_loss(loss, top, excess, z_loss), (top, excess, total, some)


@compiled
def _dense_backward(upstream, saved, logits, targets, class_weight=None, *, smoothing, gamma, z_loss, softcap):
    top, excess, total, some = saved
    a = _smoothed(targets, class_weight, some, top.dtype, smoothing)
    return _gradient(upstream, logits, a, total, top, excess, gamma=gamma, z_loss=z_loss, softcap=softcap)


_dense = differentiable(_dense_forward, _dense_backward)


# The gradient for the targets is a kernel of its own, of value 0, so that only who asks for it pays for it.


def _no_loss(targets, logits, class_weight=None, **static):
    return ops.cast(ops.zeros_like(targets[:, :1]), _targets.accumulator_dtype(logits)), ()


@compiled
def _dense_backward_for_targets(upstream, saved, targets, logits, class_weight=None, *, smoothing, gamma, softcap):
    _, (top, excess, _, _) = _dense_forward.in_one_piece(
        logits, targets, class_weight, smoothing=smoothing, gamma=gamma, z_loss=0.0, softcap=softcap
    )
    loss = _gap(_capped(logits, softcap), top) + ops.log1p(excess)
    if gamma:
        loss = loss * _focal(loss, gamma)[0]
    weight = (1.0 - smoothing) * upstream * (1.0 if class_weight is None else class_weight)
    return ops.cast(_times(weight, loss), targets.dtype)


_for_targets = differentiable(_no_loss, _dense_backward_for_targets)
