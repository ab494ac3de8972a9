"""Softmax cross-entropy of sparse labels: one integer for each distribution."""

from typing import Any

from keras import ops

from keras_xent import _backend
from keras_xent._backend import custom_gradient, no_autograph, on_any_mesh, take_at_columns
from keras_xent._named_arguments import named_arguments
from keras_xent._types import Tensor
from keras_xent.kernels import _fast_steps, _first_steps
from keras_xent.kernels import _label_row as label_row
from keras_xent.kernels import _softmax_row as row
from keras_xent.kernels._compiled import CompiledKernel, RowKernel, row_kernel
from keras_xent.kernels._dtypes import to_float_tensor, to_tensor, upcast
from keras_xent.kernels._labels import class_indices, gather_class_weights, in_range, optional_class_weights, valid_mask
from keras_xent.kernels._masking import nan_unless, where_or_zero
from keras_xent.kernels._options import SoftmaxOptions
from keras_xent.kernels._shapes import as_rows, broadcast_to_rows, checked_axis, reshape_to, size_of, squeeze_class_axis
from keras_xent.kernels._xla_cpu import SUM_COMPUTES_TERMS, is_compiled_fast, keeps_exponentials, row_sum


@no_autograph
@named_arguments
@on_any_mesh
def sparse_softmax_cross_entropy(
    labels: Tensor,
    logits: Tensor,
    *,
    axis: int = -1,
    mask: Tensor = None,
    ignore_class: int | None = None,
    label_smoothing: float = 0.0,
    class_weight: Any = None,
    focal_gamma: float = 0.0,
    z_loss: float = 0.0,
    logit_softcap: float | None = None,
) -> Tensor:
    """Cross-entropy of integer labels under the softmax of the logits, one value for each label.

    For classification with one class out of many, and for next-token prediction. Neither the one-hot labels nor the
    probabilities are materialized; the forward pass allocates nothing of the logits' size.

    Formula, for label `k`, smoothing `s`, class weights `w`, `nll_c = lse - x_c`:
    `(1 - s) w_k nll_k + (s / C) sum_c w_c nll_c + z lse^2`, each `nll_c` times `(1 - p_c)^gamma` if focal.

    Equivalent to (without options):

        log_p = keras.ops.log_softmax(logits, axis=-1)
        loss = -keras.ops.take_along_axis(log_p, labels[..., None], axis=-1)[..., 0]

    Args:
        labels: integers `[...]`, the shape of `logits` without the class axis. Never cast to a float type.
        logits: `[..., C]` (or `C` at `axis`), bfloat16, float16, float32 or float64, read in their own dtype.
        axis: the class axis.
        mask: booleans of the shape of `labels`, or `[B]`; False entries give loss 0 and gradient 0 whatever lies under
            them.
        ignore_class: a label that is masked in the same way.
        label_smoothing: share `s` in [0, 1] of the target spread evenly over all classes.
        class_weight: one weight per class, `[C]`, or a dict from class to weight (others 1). Without a gradient.
        focal_gamma: exponent of the focal factor `(1 - p)^gamma`; 0 is plain cross-entropy.
        z_loss: weight of `lse^2`, which keeps logits from drifting. Not class-weighted.
        logit_softcap: `c` of `c tanh(x / c)`, applied to the logits first.

    Returns:
        Losses in nats, of the shape of `labels`, float32 (float64 for float64 logits). A label out of range,
        where no error can be raised, gives NaN in the loss and in the gradient of its row.

    Raises:
        ValueError: shapes that do not fit; in eager mode, a label out of range.
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
    labels = to_tensor(labels, "labels")
    logits = to_float_tensor(logits, "logits")
    rank = len(logits.shape)
    axis = checked_axis(axis, rank)
    labels = squeeze_class_axis(labels, logits, axis)
    valid = valid_mask(labels, mask, ignore_class)
    num_classes = size_of(logits, axis)
    indices = class_indices(labels, num_classes, valid)
    rows = as_rows(logits, axis)  # [rows, C] or [outer, C, inner]
    loss = _sparse(
        rows,
        broadcast_to_rows(indices, axis, rank),
        *optional_class_weights(class_weight, num_classes, logits, len(rows.shape)),
        options=SoftmaxOptions(label_smoothing, focal_gamma, z_loss, logit_softcap),
    )
    return where_or_zero(reshape_to(loss, labels), valid)


def label_ranks(labels: Tensor, logits: Tensor, *, axis: int = -1) -> Tensor:
    """Returns the rank of each label, 0 where `argmax` is the label. Without gradient.

    NaN for labels out of range.
    """
    labels, logits = to_tensor(labels), to_float_tensor(logits)
    indices = ops.where(in_range(labels, size_of(logits, axis)), ops.cast(labels, "int32"), -1)
    rows, rank = as_rows(ops.stop_gradient(logits), axis), len(logits.shape)
    ranks, _ = _backend.with_rounded_rows(_ranks, (True, True))(rows, broadcast_to_rows(indices, axis % rank, rank))
    return reshape_to(ranks, labels)


@row_kernel(num_outputs=1, is_blocked=lambda rows: True)
def _ranks(logits, labels):
    return row.rank_of_label(logits, labels), ()


def forward(
    logits: Tensor, labels: Tensor, class_weight: Tensor = None, *, options: SoftmaxOptions
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """`(losses, (max_logit, sum_exp_minus_one))` of rows `[n, C]` with labels `[n, 1]`, -1 for one out of range.

    Not compiled by itself.
    """
    softcap, smoothing = options.logit_softcap, options.label_smoothing
    has_label = labels >= 0
    label = ops.maximum(labels, 0)
    max_logit = row.max_of_logits(logits)
    label_logit = upcast(take_at_columns(logits, label))

    def off_label(logits, ids):
        return exp_shifted_except_label(logits, ids, label, max_logit, softcap)

    # The label's own term less 1: exact where it is 1, and elsewhere the sum of the others is at least 1.
    at_label = row.exp_shifted(label_logit, max_logit, softcap) - 1.0
    if not smoothing or class_weight is None:
        sum_exp_minus_one = row_sum(off_label, logits, row.class_ids(logits)) + at_label
    else:
        # Where the label has weight 0, the loss may be that of the largest logit alone, whose 1 is subtracted here.
        sum_exp_minus_one = row.sum_exp_minus_one(logits, max_logit, softcap)
    sum_exp_minus_one = row.with_infinite_logits(sum_exp_minus_one, max_logit, softcap)
    sum_exp_minus_one = nan_unless(has_label, sum_exp_minus_one)

    label_weight = gather_class_weights(class_weight, label)
    sum_of_losses = _smoothing_loss(logits, class_weight, max_logit, sum_exp_minus_one, options) if smoothing else None
    loss = label_row.loss(label_logit, label_weight, sum_of_losses, max_logit, sum_exp_minus_one, options)
    if class_weight is not None or smoothing == 1.0:
        # A factor of 0 has made 0 of the NaN of a label out of range, whose weight is that of class 0.
        loss = nan_unless(has_label, loss)
    return loss, (max_logit, sum_exp_minus_one)


def _smoothing_loss(logits, class_weight, max_logit, sum_exp_minus_one, options):
    """`s / C sum_c w_c nll_c`, with focal factors if asked."""
    smoothing, num_classes = options.label_smoothing, row.num_classes_of(logits)
    if class_weight is None and not options.focal_gamma and options.logit_softcap is None:
        # Each term is divided, since their sum may overflow.
        mean_below_max = row_sum(lambda x: (max_logit - upcast(x)) * (1.0 / num_classes), logits)
        return smoothing * label_row.mean_of_losses(mean_below_max, num_classes, max_logit, sum_exp_minus_one)
    weights = ops.ones_like(row.class_ids(logits, max_logit.dtype)) if class_weight is None else class_weight
    off_value = smoothing / num_classes * weights
    return row.sum_of_losses(
        lambda weights: weights, ops.sum(off_value), logits, (off_value,), max_logit, sum_exp_minus_one, options
    )


def exp_shifted_except_label(
    logits: Tensor, ids: Tensor, label: Tensor, max_logit: Tensor, softcap: float | None
) -> Tensor:
    """`exp(x - max_logit)` of each class, 0 for the label."""
    return where_or_zero(row.exp_shifted(logits, max_logit, softcap), ops.not_equal(ids, label))


def backward(
    upstream: Tensor,
    residuals: tuple[Tensor, Tensor],
    logits: Tensor,
    labels: Tensor,
    class_weight: Tensor = None,
    exp_shifted: Tensor = None,
    *,
    options: SoftmaxOptions,
) -> Tensor:
    """The gradient for the logits, `upstream` times that of each row's loss. Not compiled by itself.

    `exp_shifted` holds `exp_shifted_except_label`, where it is still in memory; it may also be the third residual.
    """
    smoothing, softcap = options.label_smoothing, options.logit_softcap
    dead_rows = row.is_dead_row(upstream, *residuals[:2])
    max_logit, sum_exp_minus_one, x, *kept = row.zero_rows(dead_rows, *residuals[:2], logits, *residuals[2:])
    exp_shifted = kept[0] if kept else exp_shifted
    num_classes = row.num_classes_of(logits)
    is_label = ops.equal(row.class_ids(logits), labels)
    off_value = smoothing / num_classes * (1.0 if class_weight is None else class_weight)
    label = ops.maximum(labels, 0)
    label_weight = gather_class_weights(class_weight, label)
    mean_weight = 1.0 if class_weight is None else ops.sum(class_weight) / num_classes
    if options.focal_gamma and smoothing:
        weights = 1.0 if class_weight is None else class_weight
        target = ops.where(is_label, (1.0 - smoothing) * weights, ops.zeros((), max_logit.dtype)) + off_value
        # `logits_gradient` sums the targets itself, times their factors.
        return row.logits_gradient(upstream, dead_rows, x, target, 0.0, max_logit, sum_exp_minus_one, options)

    # The label's logit comes from the logits themselves: from `x`, that would be written to memory.
    (label_logit,) = row.zero_rows(dead_rows, take_at_columns(logits, label))
    at_label, factor = label_row.gradient(
        label_logit, label_weight, mean_weight, num_classes, max_logit, sum_exp_minus_one, options
    )
    if exp_shifted is None:
        # The terms of the sum in `forward`: one array of both, where they are parts of one program.
        exp_shifted = exp_shifted_except_label(x, row.class_ids(logits), label, max_logit, softcap)
    sum_exp = 1.0 + sum_exp_minus_one
    off_label = exp_shifted * factor - off_value * sum_exp if smoothing else exp_shifted * factor
    gradient = ops.where(is_label, at_label, off_label)
    # A division of rows has a loop of its own.
    gradient = gradient * upstream / sum_exp if is_compiled_fast(logits) else gradient * (upstream / sum_exp)
    return row.to_logits_dtype(gradient, dead_rows, x, softcap)


# Slices that a sum computes beat blocks.
_sparse_forward = RowKernel(forward, num_outputs=3, is_blocked=lambda rows, options: not SUM_COMPUTES_TERMS)
_sparse_backward = CompiledKernel(backward)


def _exp_except_label(residuals, logits, labels, class_weight=None, *, options):
    ids, label = row.class_ids(logits), ops.maximum(labels, 0)
    return exp_shifted_except_label(logits, ids, label, residuals[0], options.logit_softcap)


# A step that is one program has other forms of the two, for losses without most options.
_sparse = custom_gradient(
    _sparse_forward,
    _sparse_backward,
    has_rows=(True, True, False),
    keep=_exp_except_label,
    keeps=lambda logits, *_, options: keeps_exponentials(logits),
    step=_fast_steps.SPARSE,
    small_step=_first_steps.SPARSE,
)
