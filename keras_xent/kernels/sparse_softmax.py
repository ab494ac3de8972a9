"""Softmax cross-entropy of sparse labels: one integer for each distribution."""

from typing import Any

import keras
from keras import ops

from keras_xent.kernels import _softmax_row as row
from keras_xent.kernels import targets as _targets
from keras_xent.kernels._compile import as_written, compiled, differentiable
from keras_xent.kernels._rows import compiled_by_rows, row_sum, selected, times


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
    labels, logits = _targets.to_tensor(labels), row.floating(logits)
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
        *row.optional_class_weights(class_weight, num_classes, logits, len(rows.shape)),
        smoothing=float(label_smoothing),
        gamma=float(focal_gamma),
        z_loss=float(z_loss),
        softcap=None if logit_softcap is None else float(logit_softcap),
    )
    return selected(ops.reshape(loss, ops.shape(labels)), valid)


def label_ranks(labels: Any, logits: Any, *, axis: int = -1) -> Any:
    """How many classes are predicted before each label: 0 where `argmax` is the label. Without gradient.

    NaN for labels that are no class.
    """
    labels, logits = _targets.to_tensor(labels), row.floating(logits)
    known = _targets.are_classes(labels, ops.shape(logits)[axis])
    indices = ops.where(known, ops.cast(labels, "int32"), -1)
    rows = _targets.as_rows(ops.stop_gradient(logits), axis)
    ranks, _ = _ranks(rows, _targets.along_rows(indices, axis % len(logits.shape), len(logits.shape)))
    return ops.reshape(ranks, ops.shape(labels))


@compiled_by_rows(outputs=1, blocked=lambda: True)
def _ranks(logits, labels):
    return row.rank(logits, labels), ()


def forward(logits, labels, class_weight=None, *, smoothing, gamma, z_loss, softcap):
    """`(losses, (top, excess))` of rows `[n, C]` with labels `[n, 1]`, -1 for no class. Not compiled by itself."""
    num_classes = row.number_of_classes(logits)
    is_class = labels >= 0
    label = ops.maximum(labels, 0)
    top = row.top(logits)
    at_label = row.accurate(ops.take_along_axis(logits, label, axis=1))

    def others(logits, classes):
        return masses_of_others(logits, classes, label, top, softcap)

    own = ops.expm1(row.below(at_label, top, softcap))
    excess = row_sum(others, logits, row.classes(logits)) + own
    excess = row.with_infinities(excess, logits, top, softcap)
    excess = ops.where(is_class, excess, ops.full_like(excess, float("nan")))

    weights = ops.ones_like(row.classes(logits, top.dtype)) if class_weight is None else class_weight
    label_weight = 1.0 if class_weight is None else ops.take(ops.reshape(class_weight, (-1,)), label)
    nll = row.nll(at_label, top, excess, softcap)
    if gamma:
        nll = nll * row.focal(nll, gamma)[0]
    loss = times(label_weight, nll)
    if smoothing:
        spread = row.sum_of_losses(
            lambda weights: weights,
            ops.sum(weights),
            logits,
            (weights,),
            top,
            excess,
            gamma=gamma,
            softcap=softcap,
        )
        loss = times(1.0 - smoothing, loss) + smoothing / num_classes * spread
    return row.plus_z_loss(loss, top, excess, z_loss, softcap), (top, excess)


def masses_of_others(logits, classes, label, top, softcap):
    """`exp(x - top)` of each class, 0 for the label."""
    return selected(row.mass(logits, top, softcap), ops.not_equal(classes, label))


def backward(upstream, saved, logits, labels, class_weight=None, masses=None, *, smoothing, gamma, z_loss, softcap):
    """The gradient for the logits, `upstream` times that of each row's loss. Not compiled by itself.

    `masses` are those of the other classes, where they are still at hand.
    """
    unasked = row.unasked(upstream, *saved)
    top, excess, x = row.without(unasked, *saved, logits)
    is_label = ops.equal(row.classes(logits), labels)
    weights = 1.0 if class_weight is None else class_weight
    spread = smoothing / row.number_of_classes(logits) * weights if smoothing else 0.0
    label = ops.maximum(labels, 0)
    label_weight = 1.0 if class_weight is None else ops.take(ops.reshape(class_weight, (-1,)), label)
    total = (1.0 - smoothing) * label_weight * ops.ones_like(top)
    if smoothing:
        total = total + smoothing * (1.0 if class_weight is None else ops.mean(class_weight))
    if gamma and smoothing:
        a = ops.where(is_label, (1.0 - smoothing) * weights, ops.zeros((), top.dtype)) + spread
        return row.gradient(upstream, unasked, x, a, total, top, excess, gamma=gamma, z_loss=z_loss, softcap=softcap)

    # Only the label's own gradient needs care, and that is one number for each row: 1 - p comes from the loss, which
    # is exact where p has rounded to 1.
    # Taken from the logits themselves: taken from `x`, that would be made in memory.
    (own,) = row.without(unasked, ops.take_along_axis(logits, label, axis=1))
    nll = row.nll(own, top, excess, softcap)
    target = (1.0 - smoothing) * label_weight
    if smoothing:
        target = target + smoothing / row.number_of_classes(logits) * label_weight
    if gamma:
        target = total = total * row.focal(nll, gamma)[1]
    slope = total + 2.0 * z_loss * (row.capped(top, softcap) + ops.log1p(excess)) if z_loss else total
    at_label = upstream * ((total - target) + (slope - total) + slope * ops.expm1(-nll))
    share = upstream * slope / (1.0 + excess)
    elsewhere = row.at_most_1(row.mass(x, top, softcap) if masses is None else masses) * share
    if smoothing:
        elsewhere = elsewhere - upstream * spread
    return row.finished(ops.where(is_label, at_label, elsewhere), unasked, x, softcap)


# Without smoothing all terms of the row's sum are simple, and slices beat blocks on TensorFlow.
_sparse_forward = compiled_by_rows(
    outputs=3, blocked=lambda *, smoothing, **others: keras.backend.backend() == "jax" or smoothing > 0
)(forward)
_sparse_backward = compiled(backward)
_sparse = differentiable(_sparse_forward, _sparse_backward)
