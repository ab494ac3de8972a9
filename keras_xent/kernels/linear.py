"""Linear cross-entropy: the logits' matmul and the sparse softmax cross-entropy in one, without the logits.

The tokens are taken in chunks. For each, the logits of the chunk are made, and the bodies of the sparse softmax kernel
turn them into losses and, in the same memory, into their gradient, which two more matmuls turn into gradients for the
hidden states and for the kernel. So what exists at once is one chunk of logits.

Tokens that do not count (masked, ignored, of weight 0) are moved to the end, and the loop ends before them.
"""

import functools
from typing import Any, NamedTuple

from keras import ops

from keras_xent.kernels import _devices, sparse_softmax
from keras_xent.kernels import _softmax_row as row
from keras_xent.kernels import reduction as _reduction
from keras_xent.kernels import targets as _targets
from keras_xent.kernels._compile import (
    accelerated,
    as_written,
    by_xla_on_cpu,
    compiled,
    differentiable_ahead,
    dot,
    loop,
    with_rows,
)
from keras_xent.kernels._rows import in_blocks, rows_of_a_block, selected

# Bytes of one chunk of logits, and its fewest tokens: each chunk adds once to the kernel's gradient, which has to cost
# little beside the matmuls of its tokens (docs/performance.md).
_CHUNK_BYTES = 2**26
_CHUNK_BYTES_OF_AN_ACCELERATOR = 2**29
_FEWEST_ROWS = 512
# What does not count is left out by whole chunks: where that may be some, there should be a few.
_FEWEST_CHUNKS_TO_LEAVE_OUT = 4
# XLA:CPU makes a product in memory before adding it to the gradient. Larger gradients are made in strips of classes.
_STRIP_BYTES = 2**26


class Statistics(NamedTuple):
    """What a loss knows of each token beside its loss; arrays of the shape of the labels, without gradients."""

    # The cross-entropy without smoothing, weights of classes, focal factor and z-loss; 0 where nothing counts.
    nll: Any
    # How many classes are predicted before the label: 0 for the largest logit; None if not asked for.
    rank: Any
    # Whether the token counts, by mask and `ignore_class`; None if all do.
    valid: Any


def linear_cross_entropy(
    hidden: Any,
    kernel: Any,
    labels: Any,
    bias: Any = None,
    *,
    token_weights: Any = None,
    transpose_kernel: bool = False,
    mask: Any = None,
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
) -> Any:
    """Cross-entropy of integer labels under the softmax of `hidden @ kernel + bias`, without making these logits.

    For language models and other large vocabularies. Memory is that of the gradients and of one chunk of logits: 64 MB
    on a CPU, 512 MB on an accelerator, or 512 tokens where these take more. Tokens that do not count cost nothing.

    Formula: that of `sparse_softmax_cross_entropy` with `x = hidden @ kernel + bias`.

    Equivalent to:

        logits = hidden @ kernel + bias
        losses = kx.kernels.sparse_softmax_cross_entropy(labels, logits, ...)

    Args:
        hidden: hidden states `[..., D]`, bfloat16, float16, float32 or float64. Products are added up in float32
            (float64 for float64), and so is the gradient for `kernel`.
        kernel: `[D, V]`, or `[V, D]` with `transpose_kernel`, as embeddings have it.
        labels: integers `[...]`, the shape of `hidden` without its last axis.
        bias: `[V]`, or None.
        token_weights: weights of the shape of `labels`, or `[B]`, `[B, 1]` for labels `[B, T]`. They have a gradient;
            tokens of weight 0 are left out, and so is theirs.
        transpose_kernel: whether the kernel is `[V, D]`.
        mask, ignore_class, label_smoothing, class_weight, focal_gamma, z_loss, logit_softcap: as in
            `sparse_softmax_cross_entropy`.
        reduction: `"none"`, or one of the reductions of the losses: these form the gradient while the loss is computed,
            with three matmuls in all instead of four.
        normalizer: a number in place of the reduction's denominator.
        training: whether gradients will be asked for. Only TensorFlow has to be told; where it was told wrongly the
            result is the same and takes longer.
        gradients: which of the inputs need one. Only TensorFlow has to be told.

    Returns:
        The reduced loss, or losses of the shape of `labels`, float32 (float64 for float64 hidden states).

    Raises:
        ValueError: shapes that do not fit; in eager mode, a label that is no class.
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
    loss, _ = with_statistics(
        hidden,
        kernel,
        labels,
        bias,
        token_weights=token_weights,
        transpose_kernel=transpose_kernel,
        mask=mask,
        ignore_class=ignore_class,
        label_smoothing=label_smoothing,
        class_weight=class_weight,
        focal_gamma=focal_gamma,
        z_loss=z_loss,
        logit_softcap=logit_softcap,
        reduction=reduction,
        normalizer=normalizer,
        training=training,
        gradients=gradients,
    )
    return loss


@as_written
def with_statistics(
    hidden: Any,
    kernel: Any,
    labels: Any,
    bias: Any = None,
    *,
    token_weights: Any = None,
    transpose_kernel: bool = False,
    mask: Any = None,
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
    ranks: bool = False,
) -> tuple[Any, Statistics]:
    """`linear_cross_entropy`, and the statistics of each token; `ranks` asks for the label's among the classes."""
    hidden, kernel, bias = _checked_matrices(hidden, kernel, bias, transpose_kernel)
    num_classes = kernel.shape[0 if transpose_kernel else 1]
    labels = _checked_labels(labels, hidden)
    valid = _targets.counted(labels, None if mask is None else _targets.to_tensor(mask), ignore_class)
    indices = ops.reshape(_targets.class_indices(labels, num_classes, valid), (-1, 1))
    dtype = _targets.accumulator_dtype(hidden)
    weights = None
    if token_weights is not None:
        token_weights = ops.cast(_targets.to_tensor(token_weights), dtype)
        weights = _targets.aligned_weights(token_weights, labels.shape, "token_weights", like=labels)
    class_weights = label_weights = None
    if class_weight is not None:
        class_weights = _targets.class_weights(class_weight, num_classes, dtype, 2)
        label_weights = ops.take(ops.reshape(class_weights, (-1,)), ops.maximum(indices, 0))
        label_weights = ops.reshape(label_weights, ops.shape(labels))
    share, denominator = _reduction.weighting(
        ops.zeros(ops.shape(labels), dtype),
        reduction=reduction,
        valid=valid,
        weights=weights,
        label_weights=label_weights,
        normalizer=normalizer,
    )
    column = ops.reshape(share, (-1, 1))
    all_count = valid is None and weights is None
    inputs = (ops.reshape(hidden, (-1, hidden.shape[-1])), kernel, bias)
    others = (indices, class_weights, None if all_count else ops.not_equal(column, 0))
    wanted = tuple(name in gradients for name in ("hidden", "kernel", "bias"))
    static = {
        "transpose": bool(transpose_kernel),
        "ranks": bool(ranks),
        "smoothing": float(label_smoothing),
        "gamma": float(focal_gamma),
        "z_loss": float(z_loss),
        "softcap": None if logit_softcap is None else float(logit_softcap),
    }
    if denominator is None:
        losses, aside = _losses(inputs, others, wanted, False, **static)
        losses = ops.reshape(losses, ops.shape(labels))
        loss = losses if weights is None else selected(losses, ops.not_equal(share, 0)) * share
    else:
        total, aside = _total((*inputs, column), others, (*wanted, True), bool(training), **static)
        loss = _reduction.mean(total, denominator, reduction, normalizer)
    nll, found = (None if a is None else ops.reshape(a, ops.shape(labels)) for a in aside)
    return loss, Statistics(nll, found, valid)


def _checked_matrices(hidden, kernel, bias, transpose):
    hidden, kernel = row.floating(hidden), row.floating(kernel)
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
        bias = row.floating(bias)
        if tuple(bias.shape) != (num_classes,):
            raise ValueError(
                f"`bias` must have shape ({num_classes},), one number for each class of the kernel. "
                f"Received: bias of shape {tuple(bias.shape)}."
            )
    return hidden, kernel, bias


def _checked_labels(labels, hidden):
    labels = _targets.to_tensor(labels)
    if len(labels.shape) == len(hidden.shape) and labels.shape[-1] == 1 and hidden.shape[-1] != 1:
        labels = ops.squeeze(labels, axis=-1)
    if not _targets.same_shape(labels.shape, hidden.shape[:-1]):
        raise ValueError(
            "`labels` must have the shape of `hidden` without its last axis, one integer for each token. "
            f"Received: labels of shape {tuple(labels.shape)} and hidden of shape {tuple(hidden.shape)}."
        )
    return labels


# The two kernels: the losses, whose gradient waits for what comes from upstream, and the weighted sum of the losses,
# whose gradient can be formed at once but for one factor.


def _forward_losses(inputs, others, wanted, **static):
    losses, nll, found, _ = _run(inputs, None, others, wanted=(False,) * 3, **static)
    return losses, (nll, found), None


def _backward_losses(upstream, saved, inputs, others, wanted, **static):
    labels, class_weights, counts = others
    counts = ops.not_equal(upstream, 0) if counts is None else ops.logical_and(counts, ops.not_equal(upstream, 0))
    others = labels, class_weights, counts
    *_, gradients = _run(inputs, upstream, others, wanted=wanted, **{**static, "ranks": False})
    return [None if g is None else ops.cast(g, x.dtype) for g, x in zip(gradients, inputs, strict=True)]


def _forward_total(inputs, others, wanted, **static):
    *matrices, share = inputs
    losses, nll, found, gradients = _run(
        matrices, share if any(wanted[:3]) else None, others, wanted=wanted[:3], **static
    )
    total = _reduction.total(ops.where(ops.equal(share, 0), 0.0, losses) * share)
    return total, (nll, found), (gradients, losses)


def _backward_total(upstream, saved, inputs, others, wanted, **static):
    gradients, losses = saved
    if any(want and x is not None and g is None for want, x, g in zip(wanted, inputs, gradients, strict=False)):
        *matrices, share = inputs
        *_, gradients = _run(matrices, share, others, wanted=wanted[:3], **{**static, "ranks": False})
    scaled = [None if g is None else _scaled(upstream, g, x.dtype) for g, x in zip(gradients, inputs, strict=False)]
    return *scaled, upstream * losses


def _scaled(upstream, gradient, dtype):
    # A gradient that nobody asks for may be NaN.
    asked = ops.logical_or(ops.not_equal(upstream, 0.0), ops.isfinite(gradient))
    return ops.cast(selected(upstream * gradient, asked), dtype)


_losses = differentiable_ahead(_forward_losses, _backward_losses)
_total = differentiable_ahead(_forward_total, _backward_total)


# One pass over the tokens.


def _run(inputs, share, others, **static):
    """Losses, their statistics, and the wanted gradients of `sum(share * losses)`.

    `inputs` are hidden, kernel and bias, `others` labels, class_weights and counts. Shapes: hidden `[N, D]`; share,
    labels and counts `[N, 1]`; class_weights `[1, V]`. Tokens of which `counts` is False have loss and gradient 0.
    Gradients are not yet rounded to 16 bits.
    """
    hidden, kernel, bias = inputs
    labels, class_weights, counts = others
    devices = _devices.of_batch(hidden)
    return _of_batch((hidden, share, labels, counts), (kernel, bias, class_weights), devices=devices, **static)


@compiled
def _of_batch(rows, others, *, devices, **static):
    by_rows = (True, True, True, (True, False, False))
    of_device = functools.partial(_of_device, devices=devices, **static)
    return _devices.each(devices, of_device, rows, others, by_rows=by_rows)


def _of_device(rows, others, *, devices, wanted, transpose, ranks, **options):
    hidden, share, labels, counts = rows
    kernel, bias, class_weights = others
    dtype = _targets.accumulator_dtype(hidden)
    if not accelerated():
        # A CPU multiplies 16-bit floats by way of float32 in any case.
        hidden = ops.cast(hidden, dtype)
    kernel = ops.cast(kernel, hidden.dtype)
    if counts is not None:
        # What does not count may hold NaN, which 0 times it would bring into the kernel's gradient.
        hidden = selected(hidden, counts)
        share = None if share is None else selected(share, counts)
    tokens, features = ops.shape(hidden)
    size, chunks = _chunks(tokens, kernel.shape[0 if transpose else 1], all_count=counts is None)
    is_one = isinstance(chunks, int) and chunks == 1
    order, place, needed = _counting_first(None if is_one else counts, size, chunks)
    # Devices that share the classes go through the loop together, and all wait for the last at its end.
    needed = needed if order is None else _devices.largest_over(devices, needed)
    arrays = [_padded(_taken(a, order), size * chunks) for a in (hidden, labels, share) if a is not None]
    wants_hidden, wants_kernel, wants_bias = wanted
    # XLA:CPU takes half as long again for a product whose first factor lies across.
    across = ops.transpose(arrays[0]) if wants_kernel and not transpose and by_xla_on_cpu() else None

    def one_chunk(i, results):
        start = (i * size, 0)
        hidden, *columns = (ops.slice(a, start, (size, a.shape[1])) for a in arrays)
        logits = dot(hidden, kernel, transpose_b=transpose)
        if bias is not None:
            logits = logits + ops.cast(bias, dtype)
        pieces = _of_logits(logits, *columns, weights=class_weights, ranks=ranks, **options)
        results = dict(results)
        if share is not None:
            gradient = ops.cast(pieces.pop("logits"), hidden.dtype)
            if wants_hidden:
                pieces["hidden"] = dot(gradient, kernel, transpose_b=not transpose)
            if wants_kernel:

                def product(gradient):
                    if transpose:
                        return dot(gradient, hidden, transpose_a=True)
                    if across is None:
                        return dot(hidden, gradient, transpose_a=True)
                    return dot(ops.slice(across, (0, i * size), (features, size)), gradient)

                total = results.get("kernel")
                results["kernel"] = _plus_product(total, product, gradient, classes_first=transpose)
            if wants_bias and bias is not None:
                results["bias"] = results["bias"] + ops.sum(ops.cast(gradient, dtype), axis=0)
        return results | {name: with_rows(results[name], i * size, piece) for name, piece in pieces.items()}

    rows = size * chunks
    results = {name: ops.zeros((rows, 1), dtype) for name in ("losses", "nll", *(["rank"] if ranks else []))}
    if share is not None:
        shapes = {"hidden": (rows, features), "kernel": kernel.shape}
        if bias is not None:
            shapes["bias"] = bias.shape
        for (name, shape), want in zip(shapes.items(), wanted, strict=False):
            if want and not (is_one and name == "kernel"):
                results[name] = ops.zeros(shape, dtype)
    results = one_chunk(0, results) if is_one else loop(needed, one_chunk, results)

    def back_in_place(name):
        array = results.get(name)
        if array is None:
            return None
        array = array[:tokens] if place is None else ops.take(array, place, axis=0)
        return selected(array, counts)

    over_all = (_devices.sum_over(devices, results.get(name)) for name in ("kernel", "bias"))
    gradients = back_in_place("hidden"), *over_all
    return back_in_place("losses"), back_in_place("nll"), back_in_place("rank"), gradients


def _chunks(tokens, num_classes, *, all_count):
    """Tokens of a chunk, and the number of chunks: as even as they can be, and a whole number of blocks each."""
    bytes_ = _CHUNK_BYTES_OF_AN_ACCELERATOR if accelerated() else _CHUNK_BYTES
    block = rows_of_a_block((1, num_classes))
    most = max(_FEWEST_ROWS, bytes_ // (4 * num_classes))
    if isinstance(tokens, int) and not all_count:
        most = min(most, max(1, _FEWEST_ROWS // 2, -(-tokens // _FEWEST_CHUNKS_TO_LEAVE_OUT)))
    chunks = -(-tokens // most)
    if isinstance(tokens, int):
        size = -(-tokens // max(chunks, 1))
        return (size if size <= block else -(-size // block) * block), chunks
    size = -(-tokens // ops.maximum(chunks, 1))
    return ops.where(size <= block, size, -(-size // block) * block), chunks


def _counting_first(counts, size, chunks):
    """The tokens in the order in which they are taken, the place of each in that order, and how many chunks to run."""
    if counts is None:
        return None, None, chunks
    counts = ops.reshape(counts, (-1,))
    number = ops.cumsum(ops.cast(counts, "int32"))
    tokens = ops.shape(counts)[0]
    index = ops.arange(tokens, dtype="int32")
    counting = ops.sum(ops.cast(counts, "int32"))
    place = ops.where(counts, number - 1, counting + index - number)
    # Their own places make the keys differ, so that any sort is a stable one.
    order = ops.argsort(place)
    return order, place, -(-counting // (max(size, 1) if isinstance(size, int) else ops.maximum(size, 1)))


def _taken(array, order):
    return array if order is None else ops.take(array, order, axis=0)


def _padded(array, rows):
    missing = rows - ops.shape(array)[0]
    if isinstance(missing, int) and missing == 0:
        return array
    return ops.concatenate([array, ops.zeros((missing, array.shape[1]), array.dtype)])


def _of_logits(logits, labels, share=None, *, weights, ranks, **options):
    """Losses and statistics of a chunk, by name; with shares also the gradient, in the memory of the logits."""

    def on_block(logits, labels, *share):
        losses, saved = sparse_softmax.forward(logits, labels, weights, **options)
        label = ops.maximum(labels, 0)
        at_label = row.accurate(ops.take_along_axis(logits, label, axis=1))
        top, excess = saved
        rank = [row.rank(logits, labels)] if ranks else []
        statistics = (losses, row.nll(at_label, top, excess, options["softcap"]), *rank)
        if not share:
            return statistics
        # The gradient takes the place of the logits. XLA:CPU would copy them for a reader that it does not wait for.
        share = _after(*share, losses, *rank)
        masses = None
        if by_xla_on_cpu():
            # The terms of the sum in `forward`, which XLA:CPU has made in memory. What writes the gradient to its place
            # runs on one thread, and should have no exponentials left to compute.
            masses = sparse_softmax.masses_of_others(logits, row.classes(logits), label, top, options["softcap"])
        return sparse_softmax.backward(share, saved, logits, labels, weights, masses, **options), *statistics

    arrays = (logits, labels) if share is None else (logits, labels, share)
    names = (*([] if share is None else ["logits"]), "losses", "nll", *(["rank"] if ranks else []))
    if not by_xla_on_cpu():
        return dict(zip(names, on_block(*arrays), strict=True))
    results = (ops.zeros_like(logits[:, :1]),) * len(names)
    return dict(zip(names, in_blocks(on_block, arrays, results, in_place=share is not None), strict=True))


def _after(value, *others):
    """`value`, made to depend on the others in a way that XLA does not see through."""
    for other in others:
        value = value + 0.0 * selected(other, ops.isfinite(other))
    return value


def _plus_product(total, product, gradient, *, classes_first):
    """`total + product(gradient)`, on a CPU strip of classes by strip of classes where the product would be large.

    The product alone where there is no total.
    """
    if total is None:
        return product(gradient)
    axis = 0 if classes_first else 1
    classes, other = total.shape[axis], total.shape[1 - axis]
    strips = -(-4 * classes * other // _STRIP_BYTES)
    if not by_xla_on_cpu() or strips == 1:
        return total + product(gradient)
    width = classes // strips

    def strip(start, width, total):
        columns = ops.slice(gradient, (0, start), (ops.shape(gradient)[0], width))
        begin, shape = ((start, 0), (width, other)) if classes_first else ((0, start), (other, width))
        return ops.slice_update(total, begin, ops.slice(total, begin, shape) + product(columns))

    total = loop(strips, lambda i, total: strip(i * width, width, total), total)
    rest = classes - strips * width
    return strip(strips * width, rest, total) if rest else total
