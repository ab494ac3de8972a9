"""Linear cross-entropy of distributions over the classes: the matmul of the logits and the softmax cross-entropy."""

from dataclasses import dataclass
from typing import Any

from keras import ops

from keras_xent._backend import no_autograph, on_any_mesh
from keras_xent._named_arguments import named_arguments
from keras_xent._types import Reduction, Tensor
from keras_xent.kernels import softmax
from keras_xent.kernels._dtypes import accumulator_dtype, to_tensor
from keras_xent.kernels._labels import class_weights
from keras_xent.kernels._linear_pass import GRADIENTS, OverTokens, checked_matrices, reduced_over_tokens
from keras_xent.kernels._options import SoftmaxOptions
from keras_xent.kernels._rule import Rule
from keras_xent.kernels._shapes import same_shape


@no_autograph
@named_arguments
@on_any_mesh
def linear_softmax_cross_entropy(
    hidden: Tensor,
    kernel: Tensor,
    targets: Tensor,
    bias: Tensor = None,
    *,
    token_weights: Tensor = None,
    transpose_kernel: bool = False,
    mask: Tensor = None,
    label_smoothing: float = 0.0,
    class_weight: Any = None,
    focal_gamma: float = 0.0,
    z_loss: float = 0.0,
    logit_softcap: float | None = None,
    reduction: Reduction | None = "none",
    normalizer: float | None = None,
    training: bool = True,
    gradients: tuple[str, ...] = GRADIENTS,
    low_rank: tuple[Tensor, Tensor] | None = None,
    chunk_bytes: int | None = None,
) -> Tensor:
    """Cross-entropy of target distributions under the softmax of `hidden @ kernel + bias`, without the logits.

    For soft targets: mixup, several right answers, a teacher's probabilities. They are read chunk by chunk beside the
    logits, and get no gradient.

    Formula, for logits `x = hidden @ kernel + bias`, targets `q`, `q' = q (1 - s) + s / C`, class weights `w`:
    `sum_c w_c q'_c (lse - x_c) + z lse^2`, each term of the sum times `(1 - p_c)^gamma` if focal.

    Equivalent to:

        logits = hidden @ kernel + bias
        losses = kx.kernels.softmax_cross_entropy(targets, logits, ...)

    Args:
        hidden: hidden states `[..., D]`.
        kernel: `[D, V]`, or `[V, D]` with `transpose_kernel`.
        targets: `[..., V]`, any numeric dtype.
        bias: `[V]`, or None.
        token_weights: weights of the shape of the tokens, or `[B]`, `[B, 1]` for tokens `[B, T]`.
        transpose_kernel: whether the kernel is `[V, D]`.
        mask: booleans of the shape of the tokens, or `[B]`; False entries have loss and gradient 0.
        label_smoothing: share `s` in [0, 1] of the target spread evenly over all classes.
        class_weight: `[V]`, one weight per class.
        focal_gamma: exponent of the focal factor `(1 - p)^gamma`.
        z_loss: weight of the squared log-sum-exp of the logits.
        logit_softcap: `c` of `c tanh(x / c)`, applied to the logits.
        reduction: `"none"`, or one of the reductions of the losses, which form the gradient while the loss is computed.
        normalizer: a number in place of the reduction's denominator.
        training: whether a gradient will be requested. Read on TensorFlow only; it changes no result.
        gradients: which of the inputs need a gradient. Read on TensorFlow only.
        low_rank: two factors whose product is added to the kernel, and which get a gradient of their own: `[D, R]` and
            `[R, V]` (`[V, R]` and `[R, D]` with `transpose_kernel`). Neither the product nor its gradient is formed.
        chunk_bytes: memory for a chunk of logits and its targets; None to choose it.

    Returns:
        The reduced loss, or losses of the shape of the tokens, float32 (float64 for float64 hidden states).

    Raises:
        ValueError: shapes that do not fit; an argument out of its range.
        NotImplementedError: a second derivative on TensorFlow.

    Example:

    >>> import numpy as np
    >>> import keras_xent as kx
    >>> hidden, kernel = np.eye(2, dtype="float32"), np.log([[0.2, 0.8], [0.5, 0.5]]).astype("float32")
    >>> targets = np.array([[0.5, 0.5], [1.0, 0.0]])
    >>> [round(float(x), 4) for x in kx.kernels.linear_softmax_cross_entropy(hidden, kernel, targets)]
    [0.9163, 0.6931]

    References: gradients formed in the forward pass, arXiv:2410.10989 (Liger Kernel).
    """
    matrices = checked_matrices(hidden, kernel, bias, transpose_kernel, low_rank=low_rank)
    targets = to_tensor(targets, "targets")
    if not same_shape(targets.shape, (*matrices.hidden.shape[:-1], matrices.num_classes)):
        raise ValueError(
            "`targets` must have the shape of `hidden` with the classes in place of its last axis, a distribution for "
            f"each token. Received: targets of shape {tuple(targets.shape)}, hidden of shape "
            f"{tuple(matrices.hidden.shape)} and {matrices.num_classes} classes. For integer labels use "
            "`linear_cross_entropy`."
        )
    dtype = accumulator_dtype(matrices.hidden)
    weights = None if class_weight is None else class_weights(class_weight, matrices.num_classes, dtype, 2)  # [1, V]
    label_weights = None
    if class_weight is not None or reduction in ("token_mean", "sequence_mean"):
        # A row of targets weighs as much as its sum, an all-zero one nothing.
        of_classes = ops.ones((1, matrices.num_classes), dtype) if weights is None else weights
        label_weights = ops.squeeze(ops.matmul(ops.cast(targets, dtype), ops.transpose(of_classes)), axis=-1)
    rule = SoftTargetRule(SoftmaxOptions(label_smoothing, focal_gamma, z_loss, logit_softcap))
    options = OverTokens(mask, token_weights, reduction, normalizer, training, gradients, chunk_bytes)
    return reduced_over_tokens(rule, matrices, (targets,), (weights,), label_weights=label_weights, options=options)


@dataclass(frozen=True)
class SoftTargetRule(Rule):
    """Column: the cross-entropy of targets, which are the rows."""

    options: SoftmaxOptions

    num_columns = 1
    num_logits = 2
    leaves_rows = True

    def forward(self, logits: Tensor, arrays: Any, constants: Any) -> tuple[tuple[Tensor, ...], Any]:
        """The loss of each token, and what the gradient needs of the rows."""
        loss, residuals = softmax.forward(logits, *arrays, *constants, options=self.options)
        return (loss,), residuals

    def backward(self, upstream: Tensor, residuals: Any, logits: Tensor, arrays: Any, constants: Any) -> Tensor:
        """The gradient for the logits."""
        return softmax.backward(upstream, residuals, logits, *arrays, *constants, options=self.options)
