"""Softmax cross-entropy of distributions over the classes."""

from typing import Any

from keras import ops

from keras_xent._backend import custom_gradient, no_autograph, on_any_mesh, with_rounded_rows
from keras_xent._named_arguments import named_arguments
from keras_xent._types import Tensor
from keras_xent.kernels import _fast_steps, _first_steps
from keras_xent.kernels import _softmax_row as row
from keras_xent.kernels._compiled import CompiledKernel, RowKernel
from keras_xent.kernels._dtypes import accumulator_dtype, is_float, to_float_tensor, to_tensor
from keras_xent.kernels._labels import optional_class_weights, valid_mask
from keras_xent.kernels._masking import multiply_no_nan, where_or_zero
from keras_xent.kernels._options import SoftmaxOptions
from keras_xent.kernels._shapes import (
    as_rows,
    checked_axis,
    ensure_shape,
    reshape_to,
    same_shape,
    size_of,
)
from keras_xent.kernels._xla_cpu import (
    SUM_COMPUTES_TERMS,
    has_few_classes,
    is_small,
    keeps_exponentials,
    row_sum,
    sums_short_rows,
)


@no_autograph
@named_arguments
@on_any_mesh
def softmax_cross_entropy(
    targets: Tensor,
    logits: Tensor,
    *,
    axis: int = -1,
    mask: Tensor = None,
    label_smoothing: float = 0.0,
    class_weight: Any = None,
    focal_gamma: float = 0.0,
    z_loss: float = 0.0,
    logit_softcap: float | None = None,
) -> Tensor:
    """Cross-entropy between target distributions and the softmax of the logits, one value for each distribution.

    For one-hot targets, mixed labels (mixup) and distillation from a teacher. Rows of `targets` need not sum to 1; an
    all-zero row has loss 0 and gradient 0. Targets get a gradient too, where one is requested.

    Formula, for targets `q`, `q' = q (1 - s) + s / C`, class weights `w`: `sum_c w_c q'_c (lse - x_c) + z lse^2`, each
    term of the sum times `(1 - p_c)^gamma` if focal.

    Equivalent to (without options):

        loss = -keras.ops.sum(targets * keras.ops.log_softmax(logits, axis=-1), axis=-1)

    Args:
        targets: `[..., C]`, of the shape of `logits`, any numeric dtype.
        logits: `[..., C]` (or `C` at `axis`), bfloat16, float16, float32 or float64, read in their own dtype.
        axis: the class axis.
        mask: booleans of the shape of the result, or `[B]`; False has loss 0 and gradient 0.
        label_smoothing: share `s` in [0, 1] of the target spread evenly over all classes.
        class_weight: one weight `w` per class, `[C]`, or a dict from class to weight (others 1). Without a gradient.
        focal_gamma: exponent of the focal factor `(1 - p)^gamma`.
        z_loss: weight `z` of `lse^2`.
        logit_softcap: `c` of `c tanh(x / c)`, applied to the logits.

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

    References: label smoothing, arXiv:1512.00567; focal factor, arXiv:1708.02002; z-loss, arXiv:2204.02311 (section 5);
    the gradient for rows that do not sum to 1 is `A p - q`, where TensorFlow's op has `p - q`.
    """
    targets = to_tensor(targets, "targets")
    logits = to_float_tensor(logits, "logits")
    rank = len(logits.shape)
    axis = checked_axis(axis, rank)
    if not same_shape(targets.shape, logits.shape):
        raise ValueError(
            "`targets` and `logits` must have the same shape. "
            f"Received: targets of shape {tuple(targets.shape)} and logits of shape {tuple(logits.shape)}. "
            "For integer labels use the sparse loss."
        )
    targets = ensure_shape(targets, logits, "`targets` and `logits` must have the same shape.")
    differentiable_targets = is_float(targets)
    if not differentiable_targets:
        targets = ops.cast(targets, accumulator_dtype(logits))
    rows, target_rows = as_rows(logits, axis), as_rows(targets, axis)  # [rows, C] or [outer, C, inner]
    weights = optional_class_weights(class_weight, size_of(logits, axis), logits, len(rows.shape))
    options = SoftmaxOptions(label_smoothing, focal_gamma, z_loss, logit_softcap)
    loss = _losses(rows, target_rows, *weights, options=options, differentiable_targets=differentiable_targets)
    loss = reshape_to(loss, logits, without=axis)
    return where_or_zero(loss, valid_mask(loss, mask, None))


def _smooth(targets, class_weight, inverse_num_classes, dtype, smoothing):
    """`a_c = w_c q'_c`; `inverse_num_classes` is 0 for an all-zero row, which smoothing must not turn into a target."""
    a = ops.cast(targets, dtype)
    if smoothing:
        a = a * (1.0 - smoothing) + smoothing * inverse_num_classes
    return a if class_weight is None else a * class_weight


def _target_sums(targets, logits, class_weight, smoothing):
    """`A = sum_c a_c`, and `1 / C` (0 where the row of targets is all zeros)."""
    dtype = accumulator_dtype(logits)
    num_classes = row.num_classes_of(logits)
    sum_q = row_sum(lambda q: ops.cast(q, dtype), targets)
    inverse_num_classes = ops.where(ops.equal(sum_q, 0.0), ops.zeros_like(sum_q), ops.ones_like(sum_q) / num_classes)
    if class_weight is None:
        sum_a = sum_q * (1.0 - smoothing) + smoothing * inverse_num_classes * num_classes if smoothing else sum_q
    else:
        sum_a = row_sum(lambda q, w: _smooth(q, w, inverse_num_classes, dtype, smoothing), targets, class_weight)
    return sum_a, inverse_num_classes


def forward(
    logits: Tensor, targets: Tensor, class_weight: Tensor = None, *, options: SoftmaxOptions
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """`(losses, residuals)` of rows `[n, C]`, class weights `[1, C]`. Not compiled by itself."""
    smoothing, softcap = options.label_smoothing, options.logit_softcap
    sum_a, inverse_num_classes = _target_sums(targets, logits, class_weight, smoothing)
    max_logit = row.max_of_logits(logits)
    sum_exp_minus_one = row.sum_exp_minus_one(logits, max_logit, softcap)
    sum_exp_minus_one = row.with_infinite_logits(sum_exp_minus_one, max_logit, softcap)
    arrays = (targets,) if class_weight is None else (targets, class_weight)
    loss = row.sum_of_losses(
        lambda q, w=None: _smooth(q, w, inverse_num_classes, max_logit.dtype, smoothing),
        sum_a,
        logits,
        arrays,
        max_logit,
        sum_exp_minus_one,
        options,
    )
    loss = row.plus_z_loss(loss, max_logit, sum_exp_minus_one, options)
    return loss, (max_logit, sum_exp_minus_one, sum_a, inverse_num_classes)


def backward(
    upstream: Tensor,
    residuals: tuple[Tensor, ...],
    logits: Tensor,
    targets: Tensor,
    class_weight: Tensor = None,
    *,
    options: SoftmaxOptions,
) -> Tensor:
    """The gradient for the logits, `upstream` times that of each row's loss. Not compiled by itself."""
    dead_rows = row.is_dead_row(upstream, *residuals[:3])  # the sum of the targets too
    clean, targets, max_logit, sum_exp_minus_one, sum_a, inverse_num_classes, *kept = row.zero_rows(
        dead_rows, logits, targets, *residuals
    )
    a = _smooth(targets, class_weight, inverse_num_classes, max_logit.dtype, options.label_smoothing)
    return row.logits_gradient(upstream, dead_rows, clean, a, sum_a, max_logit, sum_exp_minus_one, options, *kept)


def _exp_shifted(residuals, logits, targets, class_weight=None, *, options):
    return row.exp_shifted(logits, residuals[0], options.logit_softcap)


def _keeps_exponentials(logits, *others, options):
    # An array of the size of the logits is in memory beside the gradient: `exp_shifted` of JAX's step.
    if SUM_COMPUTES_TERMS or not (is_small(logits) and keeps_exponentials(logits)):
        return False
    # Of many classes blocks are faster than the kernel without them.
    return has_few_classes(logits) or _fast_steps.DENSE.fits(logits, *others, options=options)


_dense_forward = RowKernel(forward, num_outputs=5, is_blocked=lambda rows, options: not sums_short_rows(rows))
_dense_backward = CompiledKernel(backward)
# A step that is one program has other forms of the two, for losses without options.
_dense = custom_gradient(
    _dense_forward,
    _dense_backward,
    has_rows=(True, True, False),
    keep=_exp_shifted,
    keeps=_keeps_exponentials,
    step=_fast_steps.DENSE,
    small_step=_first_steps.DENSE,
)


# The gradient for the targets is a kernel of its own, of value 0, which costs nothing where no such gradient is
# requested.


def _zero_forward(targets, logits, class_weight=None, *, options):
    return ops.cast(ops.zeros_like(targets[:, :1]), accumulator_dtype(logits)), ()


@CompiledKernel
def _dense_backward_for_targets(upstream, residuals, targets, logits, class_weight=None, *, options):
    _, (max_logit, sum_exp_minus_one, *_) = _dense_forward.unblocked(
        logits, targets, *([] if class_weight is None else [class_weight]), options=options
    )
    loss = row.nll(logits, max_logit, sum_exp_minus_one, options.logit_softcap)
    if options.focal_gamma:
        loss = loss * row.focal(loss, options.focal_gamma)[0]
    weight = (1.0 - options.label_smoothing) * upstream * (1.0 if class_weight is None else class_weight)
    return ops.cast(multiply_no_nan(weight, loss), targets.dtype)


_dense_for_targets = custom_gradient(
    _zero_forward, _dense_backward_for_targets, has_rows=(True, True, False), is_often_needed=False
)


def _losses_of_rows(rows, targets, *weights, options, differentiable_targets):
    loss = _dense(rows, targets, *weights, options=options)
    return loss + _dense_for_targets(targets, rows, *weights, options=options) if differentiable_targets else loss


# Rounded here too, which adds rows once for the two.
_losses = with_rounded_rows(_losses_of_rows, (True, True, False))
