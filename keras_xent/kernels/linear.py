"""Linear cross-entropy: the matmul of the logits and the sparse softmax cross-entropy in one, without the logits.

This file has the public function, its checks and its gradient; `_linear_loop.py` has the loop over chunks of tokens.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from keras import ops

from keras_xent._backend import no_autograph, on_any_mesh, take_at_columns, uses_xla_cpu
from keras_xent._named_arguments import named_arguments
from keras_xent._types import Reduction, Tensor
from keras_xent.kernels import _exponentials, sparse_softmax
from keras_xent.kernels import _row_statistics as row_statistics
from keras_xent.kernels import _softmax_row as row
from keras_xent.kernels._dtypes import accumulator_dtype, to_tensor, upcast
from keras_xent.kernels._labels import class_indices, class_weights, gather_class_weights, valid_mask
from keras_xent.kernels._linear_loop import Data
from keras_xent.kernels._linear_pass import GRADIENTS, OverTokens, checked_matrices, reduced
from keras_xent.kernels._masking import both, multiply_no_nan, nan_unless
from keras_xent.kernels._options import SoftmaxOptions
from keras_xent.kernels._rule import ColumnsAndGradient, Rule
from keras_xent.kernels._shapes import align_weights, same_shape


class LossStatistics(NamedTuple):
    """Values of each token that are computed beside its loss: arrays of the shape of the labels, without gradients.

    Those that were not requested are None.

    Attributes:
        nll: cross-entropy without smoothing, class weights, focal factor and z-loss; 0 for tokens that are not valid.
        rank: number of classes with larger logits than the label (equal ones before it included): 0 for `argmax`.
        valid: booleans, by mask and `ignore_class`; None if all tokens are valid.
        entropy: entropy of the predicted distribution, in nats.
        logsumexp: logarithm of the sum of the exponentials of the logits.
        confidence: largest predicted probability.
        hit: 1 where the label is the `argmax` of the logits, 0 elsewhere. Takes less time than the rank.
    """

    nll: Tensor
    rank: Tensor = None
    valid: Tensor = None
    entropy: Tensor = None
    logsumexp: Tensor = None
    confidence: Tensor = None
    hit: Tensor = None


@no_autograph
@named_arguments
@on_any_mesh
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
    reduction: Reduction | None = "none",
    normalizer: float | None = None,
    training: bool = True,
    gradients: tuple[str, ...] = GRADIENTS,
    low_rank: tuple[Tensor, Tensor] | None = None,
    chunk_bytes: int | None = None,
    return_statistics: bool | Collection[str] = False,
) -> Any:
    """Cross-entropy of integer labels under the softmax of `hidden @ kernel + bias`, without materializing the logits.

    For language models and other large vocabularies. Memory is that of the gradients and of one chunk of logits: at
    most 64 MB on a CPU, 512 MB on an accelerator, or more where 512 tokens (1024 to 2048 on an accelerator) take more.
    Tokens that are not valid cost nothing, nor does the gradient of a matrix that is not trained.

    Formula, for logits `x = hidden @ kernel + bias`, label `k`, smoothing `s`, class weights `w`, `nll_c = lse - x_c`:
    `(1 - s) w_k nll_k + (s / C) sum_c w_c nll_c + z lse^2`, each `nll_c` times `(1 - p_c)^gamma` if focal.

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
        low_rank: two factors whose product is added to the kernel, and which get a gradient of their own: `[D, R]` and
            `[R, V]` (`[V, R]` and `[R, D]` with `transpose_kernel`). Neither the product nor its gradient is formed.
        mask: booleans of the shape of `labels`, or `[B]`; False is not valid.
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
        gradients: which of the inputs need a gradient: names among `hidden`, `kernel`, `bias` and `low_rank`. Read on
            TensorFlow only.
        chunk_bytes: the most memory that a chunk of logits may take; None: chosen.
        return_statistics: whether to return `(loss, LossStatistics)`, with the nll of each token; or the names of the
            other statistics to fill: `rank`, `hit`, `entropy`, `logsumexp`, `confidence`.

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
    names = () if isinstance(return_statistics, bool) else tuple(return_statistics)
    if unknown := set(names) - set(row_statistics.NAMES):
        raise ValueError(
            f"`return_statistics` must be True, False or names among {', '.join(map(repr, row_statistics.NAMES))}. "
            f"Received: {', '.join(map(repr, sorted(unknown)))}."
        )
    options = SoftmaxOptions(label_smoothing, focal_gamma, z_loss, logit_softcap)
    names = tuple(name for name in row_statistics.NAMES if name in names)
    matrices = checked_matrices(hidden, kernel, bias, transpose_kernel, low_rank=low_rank)
    labels = checked_labels(labels, matrices.hidden)
    valid = valid_mask(labels, mask, ignore_class)
    dtype = accumulator_dtype(matrices.hidden)
    weights, counted = None, valid
    if token_weights is not None:
        weights = ops.cast(align_weights(token_weights, labels.shape, "token_weights", like=labels), dtype)
        # Under weight 0 a label may be anything.
        has_weight = ops.broadcast_to(ops.not_equal(weights, 0), ops.shape(labels))
        counted = both(valid, has_weight)
    indices = ops.reshape(class_indices(labels, matrices.num_classes, counted), (-1, 1))  # [N, 1]
    weight_of_class = label_weights = None
    if class_weight is not None:
        weight_of_class = class_weights(class_weight, matrices.num_classes, dtype, 2)  # [1, V]
        label_weights = ops.reshape(gather_class_weights(weight_of_class, indices), ops.shape(labels))
    loss, columns = reduced(
        CrossEntropyRule(options, names),
        matrices,
        Data(None, (indices,), (weight_of_class,)),
        OverTokens(valid, weights, reduction, normalizer, training, gradients, chunk_bytes),
        label_weights,
    )
    if return_statistics is False:
        return loss
    nll, *others = (ops.reshape(column, ops.shape(labels)) for column in columns)
    return loss, LossStatistics(nll=nll, valid=valid, **dict(zip(names, others, strict=True)))


@dataclass(frozen=True)
class CrossEntropyRule(Rule):
    """Columns: loss, nll, and the statistics of these names."""

    options: SoftmaxOptions
    statistics: tuple[str, ...] = ()

    @property
    def num_columns(self) -> int:  # type: ignore[override]
        """The number of columns."""
        return 2 + len(self.statistics)

    def forward(self, logits: Tensor, arrays: Any, constants: Any) -> tuple[tuple[Tensor, ...], Any]:
        """The columns, and the residuals of the rows."""
        (labels,) = arrays
        softcap = self.options.logit_softcap
        losses, residuals = sparse_softmax.forward(logits, labels, *constants, options=self.options)
        nll = losses
        if self.options != SoftmaxOptions(logit_softcap=softcap) or constants[0] is not None:
            label_logit = upcast(take_at_columns(logits, ops.maximum(labels, 0)))
            nll = row.nll(label_logit, *residuals, softcap)
        others = row_statistics.statistics(self.statistics, logits, labels, residuals, softcap)
        return (losses, nll, *others), residuals

    def backward(self, upstream: Tensor, residuals: Any, logits: Tensor, arrays: Any, constants: Any) -> Tensor:
        """The gradient for the logits."""
        (labels,) = arrays
        shifted = None
        if uses_xla_cpu():
            # The terms of the sum in `forward`, which XLA:CPU has written to memory. Writing the gradient to its place
            # runs on one thread, and should not compute exponentials.
            softcap = self.options.logit_softcap
            ids, max_logit = row.class_ids(logits), residuals[0]
            label = ops.maximum(labels, 0)
            shifted = sparse_softmax.exp_shifted_except_label(logits, ids, label, max_logit, softcap)
        (class_weights,) = constants
        return sparse_softmax.backward(
            upstream, residuals, logits, labels, class_weights, shifted, options=self.options
        )

    def row_scaled(self, upstream: Tensor, logits: Tensor, arrays: Any, constants: Any) -> ColumnsAndGradient | None:
        """The same from exponentials in the memory of the logits, for options that only weight the label's loss."""
        (labels,), (class_weights,) = arrays, constants
        if replace(self.options, focal_gamma=0.0) != SoftmaxOptions():
            return None
        found = _exponentials.of_labels(logits, labels, statistics=self.statistics)
        loss, slope = found.nll, 1.0
        if self.options.focal_gamma:
            factor, slope = row.focal(found.nll, self.options.focal_gamma)
            loss = loss * factor
        if class_weights is not None:
            weight = gather_class_weights(class_weights, labels)
            loss = nan_unless(labels >= 0, multiply_no_nan(weight, loss))
            # Out of range the sum of the exponentials is NaN, whatever class 0 weighs.
            slope = slope * ops.where(labels >= 0, weight, 1.0)
        gradient = found.gradient(labels, None if upstream is None else multiply_no_nan(upstream, slope))
        return (loss, found.nll, *found.statistics), gradient

    def values_only(self) -> "CrossEntropyRule":
        """The rule without statistics."""
        return replace(self, statistics=())


def checked_labels(labels: Tensor, hidden: Tensor) -> Tensor:
    """The labels as a tensor of the shape of the hidden states without their last axis."""
    labels = to_tensor(labels, "labels")
    if len(labels.shape) == len(hidden.shape) and labels.shape[-1] == 1 and hidden.shape[-1] != 1:
        labels = ops.squeeze(labels, axis=-1)
    if not same_shape(labels.shape, hidden.shape[:-1]):
        raise ValueError(
            "`labels` must have the shape of `hidden` without its last axis, one integer for each token. "
            f"Received: labels of shape {tuple(labels.shape)} and hidden of shape {tuple(hidden.shape)}."
        )
    return labels
