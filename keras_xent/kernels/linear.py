"""Linear cross-entropy: the matmul of the logits and the sparse softmax cross-entropy in one, without the logits.

This file has the public function, its checks and its gradient; `_linear_loop.py` has the loop over chunks of tokens.
"""

from typing import Any, NamedTuple

from keras import ops

from keras_xent._backend import fused_gradient, no_autograph
from keras_xent._types import Tensor
from keras_xent.kernels import _linear_loop
from keras_xent.kernels import reduction as _reduction
from keras_xent.kernels._dtypes import accumulator_dtype, to_float_tensor, to_tensor
from keras_xent.kernels._labels import class_indices, class_weights, gather_class_weights, valid_mask
from keras_xent.kernels._masking import where_or_zero
from keras_xent.kernels._options import SoftmaxOptions
from keras_xent.kernels._shapes import align_weights, same_shape


class LossStatistics(NamedTuple):
    """What a loss has computed of each token beside its loss; arrays of the shape of the labels, without gradients."""

    # The cross-entropy without smoothing, class weights, focal factor and z-loss; 0 for tokens that are not valid.
    nll: Tensor
    # How many classes are predicted before the label: 0 for the largest logit; None if not requested.
    rank: Tensor
    # Whether the token is valid, by mask and `ignore_class`; None if all are.
    valid: Tensor


@no_autograph
def linear_cross_entropy(
    hidden: Tensor,
    kernel: Tensor,
    labels: Tensor,
    bias: Tensor = None,
    *,
    token_weights: Tensor = None,
    transpose_kernel: bool = False,
    mask: Tensor = None,
    ignore_class: int | None = None,
    label_smoothing: float = 0.0,
    class_weight: Any = None,
    focal_gamma: float = 0.0,
    z_loss: float = 0.0,
    logit_softcap: float | None = None,
    reduction: str | None = "none",
    normalizer: float | None = None,
    training: bool = True,
    gradients: tuple[str, ...] = ("hidden", "kernel", "bias"),
    return_statistics: bool = False,
) -> Any:
    """Cross-entropy of integer labels under the softmax of `hidden @ kernel + bias`, without materializing the logits.

    For language models and other large vocabularies. Memory is that of the gradients and of one chunk of logits: 64 MB
    on a CPU, 512 MB on an accelerator, or 512 tokens where these take more. Tokens that are not valid cost nothing.

    Formula: that of `sparse_softmax_cross_entropy` with `x = hidden @ kernel + bias`.

    Equivalent to:

        logits = hidden @ kernel + bias
        losses = kx.kernels.sparse_softmax_cross_entropy(labels, logits, ...)

    Args:
        hidden: hidden states `[..., D]`, bfloat16, float16, float32 or float64. Products are accumulated in float32
            (float64 for float64), and so is the gradient for `kernel`.
        kernel: `[D, V]`, or `[V, D]` with `transpose_kernel`, the layout of embeddings.
        labels: integers `[...]`, the shape of `hidden` without its last axis.
        bias: `[V]`, or None.
        token_weights: weights of the shape of `labels`, or `[B]`, `[B, 1]` for labels `[B, T]`. They have a gradient;
            tokens of weight 0 are left out, and get none.
        transpose_kernel: whether the kernel is `[V, D]`.
        mask: booleans of the shape of `labels`; False is not valid.
        ignore_class: the label of tokens that are not valid.
        label_smoothing: share `s` in [0, 1] of the target spread evenly over all classes.
        class_weight: `[V]`, one weight per class.
        focal_gamma: exponent of the focal factor `(1 - p)^gamma`.
        z_loss: weight of the squared log-sum-exp of the logits.
        logit_softcap: `c` of `c tanh(x / c)`, applied to the logits.
        reduction: `"none"`, or one of the reductions of the losses: these form the gradient while the loss is computed,
            with three matmuls in all instead of four.
        normalizer: a number in place of the reduction's denominator.
        training: whether a gradient will be requested. Read on TensorFlow only; a wrong value costs time and changes no
            result.
        gradients: which of the inputs need a gradient. Read on TensorFlow only.
        return_statistics: whether to return `(loss, TokenStatistics)`.

    Returns:
        The reduced loss, or losses of the shape of `labels`, float32 (float64 for float64 hidden states).

    Raises:
        ValueError: shapes that do not fit; in eager mode, a label out of range.
        InvalidArgumentError: the latter in a TensorFlow graph on the CPU.
        NotImplementedError: a second derivative on TensorFlow.

    Example:

    >>> import numpy as np
    >>> import keras_xent as kx
    >>> hidden, kernel = np.eye(2, dtype="float32"), np.log([[0.2, 0.8], [0.5, 0.5]]).astype("float32")
    >>> loss = kx.kernels.linear_cross_entropy(hidden, kernel, np.array([1, 0]))
    >>> [round(float(x), 4) for x in loss]  # -ln 0.8 and -ln 0.5
    [0.2231, 0.6931]

    References: gradients formed in the forward pass, arXiv:2410.10989 (Liger Kernel); ignored tokens left out,
    arXiv:2411.09009 (Cut Cross-Entropy).
    """
    loss, statistics = with_statistics(
        hidden,
        kernel,
        labels,
        bias,
        token_weights=token_weights,
        transpose_kernel=transpose_kernel,
        mask=mask,
        ignore_class=ignore_class,
        class_weight=class_weight,
        options=SoftmaxOptions(label_smoothing, focal_gamma, z_loss, logit_softcap),
        reduction=reduction,
        normalizer=normalizer,
        training=training,
        gradients=gradients,
    )
    return (loss, statistics) if return_statistics else loss


def with_statistics(
    hidden: Tensor,
    kernel: Tensor,
    labels: Tensor,
    bias: Tensor = None,
    *,
    options: SoftmaxOptions = SoftmaxOptions(),  # noqa: B008 frozen
    token_weights: Tensor = None,
    transpose_kernel: bool = False,
    mask: Tensor = None,
    ignore_class: int | None = None,
    class_weight: Any = None,
    reduction: str | None = "none",
    normalizer: float | None = None,
    training: bool = True,
    gradients: tuple[str, ...] = ("hidden", "kernel", "bias"),
    ranks: bool = False,
) -> tuple[Tensor, LossStatistics]:
    """The loss of `linear_cross_entropy`, and the statistics of each token, with the label's rank if `ranks`."""
    hidden, kernel, bias = _checked_matrices(hidden, kernel, bias, transpose_kernel)
    num_classes = kernel.shape[0 if transpose_kernel else 1]
    labels = _checked_labels(labels, hidden)
    valid = valid_mask(labels, None if mask is None else to_tensor(mask), ignore_class)
    indices = ops.reshape(class_indices(labels, num_classes, valid), (-1, 1))  # [N, 1]
    dtype = accumulator_dtype(hidden)
    weights = None
    if token_weights is not None:
        weights = ops.cast(to_tensor(token_weights), dtype)
        weights = align_weights(weights, labels.shape, "token_weights", like=labels)
    weight_of_class = label_weights = None
    if class_weight is not None:
        weight_of_class = class_weights(class_weight, num_classes, dtype, 2)  # [1, V]
        label_weights = ops.reshape(gather_class_weights(weight_of_class, indices), ops.shape(labels))
    weights_of_losses, denominator = _reduction.reduction_weights(
        ops.zeros(ops.shape(labels), dtype),
        reduction=reduction,
        valid=valid,
        weights=weights,
        label_weights=label_weights,
        normalizer=normalizer,
    )
    column = ops.reshape(weights_of_losses, (-1, 1))  # [N, 1]
    is_active = None if valid is None and weights is None else ops.not_equal(column, 0)
    inputs = (ops.reshape(hidden, (-1, hidden.shape[-1])), kernel, bias)
    nondiff_args = (indices, weight_of_class, is_active)
    needs_grad = tuple(name in gradients for name in ("hidden", "kernel", "bias"))
    static = {"transpose": bool(transpose_kernel), "ranks": bool(ranks), "options": options}
    if denominator is None:
        losses, aux = _losses(inputs, nondiff_args, needs_grad, False, **static)
        loss = ops.reshape(losses, ops.shape(labels))
        if weights is not None:
            loss = where_or_zero(loss, ops.not_equal(weights_of_losses, 0)) * weights_of_losses
    else:
        total, aux = _total((*inputs, column), nondiff_args, (*needs_grad, True), bool(training), **static)
        loss = _reduction.mean(total, denominator, reduction, normalizer)
    nll, rank = (None if a is None else ops.reshape(a, ops.shape(labels)) for a in aux)
    return loss, LossStatistics(nll, rank, valid)


def _checked_matrices(hidden, kernel, bias, transpose):
    hidden, kernel = to_float_tensor(hidden), to_float_tensor(kernel)
    features = hidden.shape[-1] if len(hidden.shape) else None
    axis = 1 if transpose else 0
    if len(kernel.shape) != 2 or len(hidden.shape) < 1 or kernel.shape[axis] != features:
        layout = "[V, D] (transpose_kernel=True)" if transpose else "[D, V] (transpose_kernel=False)"
        raise ValueError(
            f"`hidden` must have shape [..., D] and `kernel` {layout}. "
            f"Received: hidden of shape {tuple(hidden.shape)} and kernel of shape {tuple(kernel.shape)}. "
            "For a kernel that lies the other way change `transpose_kernel`."
        )
    num_classes = kernel.shape[1 - axis]
    if bias is not None:
        bias = to_float_tensor(bias)
        if tuple(bias.shape) != (num_classes,):
            raise ValueError(
                f"`bias` must have shape ({num_classes},), one number for each class of the kernel. "
                f"Received: bias of shape {tuple(bias.shape)}."
            )
    return hidden, kernel, bias


def _checked_labels(labels, hidden):
    labels = to_tensor(labels)
    if len(labels.shape) == len(hidden.shape) and labels.shape[-1] == 1 and hidden.shape[-1] != 1:
        labels = ops.squeeze(labels, axis=-1)
    if not same_shape(labels.shape, hidden.shape[:-1]):
        raise ValueError(
            "`labels` must have the shape of `hidden` without its last axis, one integer for each token. "
            f"Received: labels of shape {tuple(labels.shape)} and hidden of shape {tuple(hidden.shape)}."
        )
    return labels


# Two kernels: the losses, whose gradient needs the upstream gradient of each, and their weighted sum, whose gradient
# can be formed in the forward pass except for one factor. `inputs` are hidden `[N, D]`, kernel and bias (and weights
# `[N, 1]`); `nondiff_args` are labels `[N, 1]`, class weights `[1, V]` and `is_active` `[N, 1]`.


def _forward_losses(inputs, nondiff_args, needs_grad, **static):
    result = _linear_loop.run(inputs, None, nondiff_args, needs_grad=(False,) * 3, **static)
    return result.losses, (result.nll, result.rank), None


def _backward_losses(upstream, residuals, inputs, nondiff_args, needs_grad, **static):
    labels, class_weights, is_active = nondiff_args
    has_gradient = ops.not_equal(upstream, 0)
    is_active = has_gradient if is_active is None else ops.logical_and(is_active, has_gradient)
    nondiff_args = labels, class_weights, is_active
    result = _linear_loop.run(inputs, upstream, nondiff_args, needs_grad=needs_grad, **{**static, "ranks": False})
    return [None if g is None else ops.cast(g, x.dtype) for g, x in zip(result.gradients, inputs, strict=True)]


def _forward_total(inputs, nondiff_args, needs_grad, **static):
    *matrices, weights = inputs
    upstream = weights if any(needs_grad[:3]) else None
    result = _linear_loop.run(matrices, upstream, nondiff_args, needs_grad=needs_grad[:3], **static)
    total = _reduction.total(ops.where(ops.equal(weights, 0), 0.0, result.losses) * weights)
    return total, (result.nll, result.rank), (result.gradients, result.losses)


def _backward_total(upstream, residuals, inputs, nondiff_args, needs_grad, **static):
    gradients, losses = residuals
    *matrices, weights = inputs
    missing = [n and x is not None and g is None for n, x, g in zip(needs_grad, matrices, gradients, strict=False)]
    if any(missing):
        # The forward pass did not know that a gradient would be requested.
        static = {**static, "ranks": False}
        gradients = _linear_loop.run(matrices, weights, nondiff_args, needs_grad=needs_grad[:3], **static).gradients
    scaled = [None if g is None else _scaled(upstream, g, x.dtype) for g, x in zip(gradients, matrices, strict=True)]
    return *scaled, upstream * losses


def _scaled(upstream, gradient, dtype):
    # With an upstream gradient of 0, a gradient of NaN leaves no trace.
    is_used = ops.logical_or(ops.not_equal(upstream, 0.0), ops.isfinite(gradient))
    return ops.cast(where_or_zero(upstream * gradient, is_used), dtype)


_losses = fused_gradient(_forward_losses, _backward_losses)
_total = fused_gradient(_forward_total, _backward_total)
