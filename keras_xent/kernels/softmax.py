"""Softmax cross-entropy of distributions over the classes."""

from typing import Any

from keras import ops

from keras_xent.kernels import _softmax_row as row
from keras_xent.kernels import targets as _targets
from keras_xent.kernels._compile import as_written, compiled, differentiable
from keras_xent.kernels._rows import compiled_by_rows, row_sum, selected, times


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
    targets, logits = _targets.to_tensor(targets), row.floating(logits)
    rank = len(logits.shape)
    axis = _targets.checked_axis(axis, rank)
    if not _targets.same_shape(targets.shape, logits.shape):
        raise ValueError(
            "`targets` and `logits` must have the same shape. "
            f"Received: targets of shape {tuple(targets.shape)} and logits of shape {tuple(logits.shape)}. "
            "For integer labels use the sparse loss."
        )
    targets = _targets.asserted_to_fit(targets, logits, "`targets` and `logits` must have the same shape.")
    shape = tuple(size for i, size in enumerate(ops.shape(logits)) if i != axis)
    learned = _targets.is_float(targets)
    if not learned:
        targets = ops.cast(targets, _targets.accumulator_dtype(logits))
    rows, target_rows = _targets.as_rows(logits, axis), _targets.as_rows(targets, axis)
    weights = row.optional_class_weights(class_weight, ops.shape(logits)[axis], logits, len(rows.shape))
    options = {
        "smoothing": float(label_smoothing),
        "gamma": float(focal_gamma),
        "softcap": None if logit_softcap is None else float(logit_softcap),
    }
    loss = _dense(rows, target_rows, *weights, z_loss=float(z_loss), **options)
    if learned:
        loss = loss + _for_targets(target_rows, rows, *weights, **options)
    valid = None if mask is None else ops.cast(_targets.to_tensor(mask), "bool")
    return selected(ops.reshape(loss, shape), valid)


def _smoothed(targets, class_weight, some, dtype, smoothing):
    """`a_c = w_c q'_c`; `some` is 0 for an all-zero row, which smoothing must not turn into a target."""
    a = ops.cast(targets, dtype)
    if smoothing:
        a = a * (1.0 - smoothing) + smoothing * some
    return a if class_weight is None else a * class_weight


def _totals(targets, logits, class_weight, smoothing):
    """`sum_c q_c`, `A = sum_c a_c`, and `1 / C` (0 where the row of targets is all zeros)."""
    dtype = _targets.accumulator_dtype(logits)
    num_classes = row.number_of_classes(logits)
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
    top = row.top(logits)
    # The targets say where the 1 of `excess` is to be taken off: all of it from the label of a one-hot row.
    scale = 1.0 / ops.maximum(mass, 1.0)

    def others(logits, targets):
        mass = row.mass(logits, top, softcap)
        return mass - ops.cast(targets, mass.dtype) * scale

    excess = row_sum(others, logits, targets) + (mass * scale - 1.0)
    excess = row.with_infinities(excess, logits, top, softcap)
    arrays = (targets,) if class_weight is None else (targets, class_weight)
    loss = row.sum_of_losses(
        lambda q, w=None: _smoothed(q, w, some, top.dtype, smoothing),
        total,
        logits,
        arrays,
        top,
        excess,
        gamma=gamma,
        softcap=softcap,
    )
    return row.plus_z_loss(loss, top, excess, z_loss, softcap), (top, excess, total, some)


@compiled
def _dense_backward(upstream, saved, logits, targets, class_weight=None, *, smoothing, gamma, z_loss, softcap):
    unasked = row.unasked(upstream, *saved[:2])
    top, excess, total, some, clean, targets = row.without(unasked, *saved, logits, targets)
    a = _smoothed(targets, class_weight, some, top.dtype, smoothing)
    return row.gradient(upstream, unasked, clean, a, total, top, excess, gamma=gamma, z_loss=z_loss, softcap=softcap)


_dense = differentiable(_dense_forward, _dense_backward)


# The gradient for the targets is a kernel of its own, of value 0, so that only who asks for it pays for it.


def _no_loss(targets, logits, class_weight=None, **static):
    return ops.cast(ops.zeros_like(targets[:, :1]), _targets.accumulator_dtype(logits)), ()


@compiled
def _dense_backward_for_targets(upstream, saved, targets, logits, class_weight=None, *, smoothing, gamma, softcap):
    _, (top, excess, _, _) = _dense_forward.in_one_piece(
        logits, targets, class_weight, smoothing=smoothing, gamma=gamma, z_loss=0.0, softcap=softcap
    )
    loss = row.nll(logits, top, excess, softcap)
    if gamma:
        loss = loss * row.focal(loss, gamma)[0]
    weight = (1.0 - smoothing) * upstream * (1.0 if class_weight is None else class_weight)
    return ops.cast(times(weight, loss), targets.dtype)


_for_targets = differentiable(_no_loss, _dense_backward_for_targets)
