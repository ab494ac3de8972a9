"""Linear kernels as differentiable functions: the values of each token, or their weighted sum.

The gradient of the values needs the upstream gradient of each, and is computed chunk by chunk in the backward pass. Of
a weighted sum it can be formed in the forward pass, except for one factor.

`inputs` are those of the loop (and the weights of the sum `[N, 1]`); `nondiff_args` are `is_active` `[N, 1]`, the rows
and the constants of the rule.
"""

from typing import Any, NamedTuple

from keras import ops

from keras_xent import _backend, arguments
from keras_xent._backend import fused_gradient
from keras_xent._types import Tensor
from keras_xent.kernels import _linear_loop
from keras_xent.kernels import reduction as _reduction
from keras_xent.kernels._dtypes import accumulator_dtype, to_float_tensor
from keras_xent.kernels._linear_loop import Data
from keras_xent.kernels._masking import both, weighted, where_or_zero
from keras_xent.kernels._rule import Rule
from keras_xent.kernels._shapes import align_weights

GRADIENTS = ("hidden", "kernel", "bias", "low_rank")


class Matrices(NamedTuple):
    """The inputs of a head: hidden `[..., D]`, kernel `[D, V]` or `[V, D]`, bias `[V]` or None."""

    hidden: Tensor
    kernel: Tensor
    bias: Tensor
    transpose: bool
    # Two factors whose product is added to the kernel, or None.
    low_rank: tuple[Tensor, Tensor] | None = None

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return self.kernel.shape[0 if self.transpose else 1]

    def inputs(self, is_active: Tensor) -> tuple[Tensor, ...]:
        """The inputs of the loop, whose rows `is_active` `[N, 1]` are used; None stands for all."""
        hidden = ops.reshape(self.hidden, (-1, self.hidden.shape[-1]))  # [N, D]
        if self.low_rank is None:
            return hidden, self.kernel, self.bias, None, None
        first, second = self.low_rank
        # The product of the factors would be of the size of the kernel, and so would its gradient.
        outer = ops.transpose(second) if self.transpose else first  # [D, R]
        inner = first if self.transpose else second
        # What lies under a mask would be multiplied by a gradient of 0.
        seen = where_or_zero(hidden, is_active)
        projected = ops.matmul(ops.cast(seen, outer.dtype), outer)  # [N, R]
        return hidden, self.kernel, self.bias, projected, inner


class OverTokens(NamedTuple):
    """The arguments that every linear loss of tokens has."""

    mask: Tensor
    token_weights: Tensor
    reduction: str | None
    normalizer: float | None
    training: bool
    gradients: tuple[str, ...]
    chunk_bytes: int | None
    # Which tokens count in a mean, beside the mask; the loss of others is 0 without it.
    counted: Tensor = None


def needed(gradients: Any) -> tuple[bool, ...]:
    """Of each input, whether these names ask for its gradient."""
    if isinstance(gradients, str) or not set(gradients) <= set(GRADIENTS):
        raise ValueError(
            f"`gradients` must hold names among {', '.join(map(repr, GRADIENTS))}. Received: gradients={gradients!r}."
        )
    hidden, kernel, bias, low_rank = (name in gradients for name in GRADIENTS)
    return hidden, kernel, bias, hidden or low_rank, low_rank


def checked_matrices(
    hidden: Tensor, kernel: Tensor, bias: Tensor, transpose: bool, *, low_rank: Any = None, of: str = ""
) -> Matrices:
    """The matrices as tensors; a ValueError where they do not fit. `of` is a prefix of the arguments' names."""
    hidden = to_float_tensor(hidden, f"{of}hidden")
    kernel = to_float_tensor(kernel, f"{of}kernel")
    features = hidden.shape[-1] if len(hidden.shape) else None
    axis = 1 if transpose else 0
    if len(kernel.shape) != 2 or len(hidden.shape) < 1 or kernel.shape[axis] != features:
        option = f"transpose_{of}kernel"
        layout = f"[V, D] ({option}=True)" if transpose else f"[D, V] ({option}=False)"
        raise ValueError(
            f"`{of}hidden` must have shape [..., D] and `{of}kernel` {layout}. "
            f"Received: {of}hidden of shape {tuple(hidden.shape)} and {of}kernel of shape {tuple(kernel.shape)}. "
            f"For a kernel that lies the other way change `{option}`."
        )
    num_classes = kernel.shape[1 - axis]
    if bias is not None:
        bias = to_float_tensor(bias, f"{of}bias")
        if tuple(bias.shape) != (num_classes,):
            raise ValueError(
                f"`{of}bias` must have shape ({num_classes},), one number for each class of the {of}kernel. "
                f"Received: {of}bias of shape {tuple(bias.shape)}."
            )
    if low_rank is not None:
        low_rank = _checked_factors(low_rank, kernel, accumulator_dtype(hidden))
    return Matrices(hidden, kernel, bias, bool(transpose), low_rank)


def _checked_factors(low_rank, kernel, dtype):
    if not isinstance(low_rank, (tuple, list)) or len(low_rank) != 2:
        raise ValueError(f"`low_rank` must be a pair of factors. Received: {type(low_rank).__name__}.")
    first, second = (ops.cast(to_float_tensor(one), dtype) for one in low_rank)
    shapes = tuple(first.shape), tuple(second.shape)
    if [len(shape) for shape in shapes] != [2, 2] or (shapes[0][0], shapes[1][1]) != tuple(kernel.shape):
        raise ValueError(
            "`low_rank` must hold two factors [rows, R] and [R, columns], with the rows and columns of the kernel. "
            f"Received: factors of shapes {shapes[0]} and {shapes[1]}, and a kernel of shape {tuple(kernel.shape)}."
        )
    return first, second


def values(
    rule: Rule, matrices: Matrices, data: Data, *, gradients: Any = GRADIENTS, chunk_bytes: int | None = None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The values of the rule `[N, num_values]`, differentiable, and its other columns."""
    static = static_options(rule, matrices, chunk_bytes)
    return _values(matrices.inputs(data.is_active), flat(data), needed(gradients), False, **static)


def reduced(
    rule: Rule, matrices: Matrices, data: Data, options: OverTokens, label_weights: Tensor = None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The first column of the rule, weighted and reduced, and its other columns `[N, 1]`.

    Mask, token weights and `label_weights` broadcast against the hidden states without their last axis, or are None.
    What has weight 0 is left out, whatever `data.is_active` says.
    """
    valid, weights, reduction, normalizer, training, gradients, chunk_bytes, counted = options
    shape = ops.shape(matrices.hidden)[:-1]
    weights_of_losses, denominator = _reduction.reduction_weights(
        ops.zeros(shape, accumulator_dtype(matrices.hidden)),
        reduction=_reduction.checked_reduction(reduction),
        valid=both(valid, counted),
        weights=weights,
        label_weights=label_weights,
        normalizer=normalizer,
    )
    column = ops.reshape(weights_of_losses, (-1, 1))  # [N, 1]
    is_active = None if valid is None and weights is None else ops.not_equal(column, 0)
    data = data._replace(is_active=is_active)
    if denominator is None:
        losses, others = values(rule, matrices, data, gradients=gradients, chunk_bytes=chunk_bytes)
        loss = ops.reshape(losses, shape)
        if weights is not None:
            loss = weighted(loss, weights_of_losses)
        return loss, others
    needs_grad = (*needed(gradients), True)
    static = static_options(rule, matrices, chunk_bytes)
    total, others = _total((*matrices.inputs(is_active), column), flat(data), needs_grad, bool(training), **static)
    return _reduction.mean(total, denominator, reduction, normalizer), others


def reduced_over_tokens(
    rule: Rule,
    matrices: Matrices,
    rows: tuple[Tensor, ...],
    constants: tuple[Tensor, ...] = (),
    *,
    label_weights: Tensor = None,
    options: OverTokens,
) -> Tensor:
    """The loss of a rule with one column, masked, weighted and reduced; the rows are `[..., K]`, one for each token."""
    data = Data(None, tuple(ops.reshape(one, (-1, one.shape[-1])) for one in rows), constants)
    mask, token_weights, *_ = options
    shape = matrices.hidden.shape[:-1]
    like = ops.zeros(ops.shape(matrices.hidden)[:-1], "bool")
    valid = weights = None
    if mask is not None:
        valid = ops.logical_or(align_weights(mask, shape, "mask", like=like), like)
    if token_weights is not None:
        weights = align_weights(token_weights, shape, "token_weights", like=like)
        weights = ops.cast(weights, accumulator_dtype(matrices.hidden))
    return reduced(rule, matrices, data, options._replace(mask=valid, token_weights=weights), label_weights)[0]


def static_options(rule: Rule, matrices: Matrices, chunk_bytes: Any) -> dict[str, Any]:
    """The options of the loop that are a part of the program."""
    chunk_bytes = None if chunk_bytes is None else arguments.count("chunk_bytes", chunk_bytes)
    return {"rule": rule, "transpose": matrices.transpose, "chunk_bytes": chunk_bytes}


def flat(data: Data) -> tuple[Tensor, ...]:
    """The data as `nondiff_args`."""
    return data.is_active, *data.rows, *data.constants


def data_of(nondiff_args: tuple[Tensor, ...], rule: Rule) -> Data:
    """The data again."""
    is_active, *others = nondiff_args
    return Data(is_active, tuple(others[: rule.num_rows]), tuple(others[rule.num_rows :]))


def _forward_values(inputs, nondiff_args, needs_grad, *, rule, **static):
    data = data_of(nondiff_args, rule)
    columns = _linear_loop.run(inputs, None, data, needs_grad=(False,) * len(inputs), rule=rule, **static).columns
    return columns[:, : rule.num_values], _others(columns, rule), None


def _backward_values(upstream, residuals, inputs, nondiff_args, needs_grad, *, rule, **static):
    data = data_of(nondiff_args, rule)
    has_gradient = ops.any(ops.not_equal(upstream, 0), axis=1, keepdims=True)
    is_active = both(data.is_active, has_gradient)
    data = data._replace(is_active=is_active)
    result = _linear_loop.run(inputs, upstream, data, needs_grad=needs_grad, rule=rule.values_only(), **static)
    return [None if g is None else ops.cast(g, x.dtype) for g, x in zip(result.gradients, inputs, strict=True)]


def _forward_total(inputs, nondiff_args, needs_grad, *, rule, **static):
    *matrices, weights = inputs
    upstream = weights if any(needs_grad[:-1]) else None
    data = data_of(nondiff_args, rule)
    result = _linear_loop.run(matrices, upstream, data, needs_grad=needs_grad[:-1], rule=rule, **static)
    losses = result.columns[:, :1]
    return _reduction.total(weighted(losses, weights)), _others(result.columns, rule), (result.gradients, losses)


def _backward_total(upstream, residuals, inputs, nondiff_args, needs_grad, *, rule, **static):
    gradients, losses = residuals
    *matrices, weights = inputs
    if is_missing(gradients, matrices, needs_grad):
        data, rule = data_of(nondiff_args, rule), rule.values_only()
        result = _linear_loop.run(matrices, weights, data, needs_grad=needs_grad[:-1], rule=rule, **static)
        gradients = result.gradients
    return *scaled(upstream, gradients, matrices), upstream * losses


def is_missing(gradients: Any, inputs: Any, needs_grad: Any) -> bool:
    """Whether the forward pass did not know that a gradient would be requested."""
    return any(n and x is not None and g is None for n, x, g in zip(needs_grad, inputs, gradients, strict=False))


def scaled(upstream: Tensor, gradients: Any, inputs: Any) -> list[Tensor]:
    """The gradients of a number, times its upstream gradient, in the dtypes of the inputs; None stays."""
    # With an upstream gradient of 0, a gradient of NaN leaves no trace.
    return [
        None if g is None else ops.cast(_backend.scale_or_zero(g, upstream), x.dtype)
        for g, x in zip(gradients, inputs, strict=True)
    ]


def _others(columns, rule):
    """The columns that have no gradient, `[N, 1]` each."""
    return tuple(columns[:, i : i + 1] for i in range(rule.num_values, rule.num_columns))


_values = fused_gradient(_forward_values, _backward_values)
_total = fused_gradient(_forward_total, _backward_total)
