"""What the tests read of the package beyond its public names: the one file to change when an internal one moves."""

from keras.src.backend import set_keras_mask

from keras_xent import source
from keras_xent.kernels import _compile, _rows, linear, reduction, sigmoid, softmax, sparse_softmax
from keras_xent.metrics import exact_sums

__all__ = ["set_keras_mask"]

# How kernels are compiled.
clear_cache = _compile.forget
compiled = _compile.compiled
on_accelerator = _compile.accelerated
without_xla = _compile.as_operations
cast_to_nearest_even = _rows.rounded

# The compiled halves of the kernels.
sparse_forward, sparse_backward = sparse_softmax._sparse_forward, sparse_softmax._sparse_backward
dense_forward, dense_backward = softmax._dense_forward, softmax._dense_backward
sigmoid_forward, sigmoid_backward = sigmoid._sigmoid_forward, sigmoid._sigmoid_backward


def linear_with_statistics(*arguments, **options):
    """The linear cross-entropy, and the statistics that metrics use."""
    return linear.with_statistics(*arguments, **options)


def chunks(tokens, classes, all_count):
    """The size of a chunk of tokens of the linear kernel, and their number."""
    return linear._chunks(tokens, classes, all_count=all_count)


def set_sizes(
    set_attribute,
    *,
    chunk_bytes=None,
    fewest_rows=None,
    strip_bytes=None,
    block_bytes=None,
    accelerator_chunk_bytes=None,
):
    """Sets what the kernels read at once; `set_attribute` is `setattr`, or monkeypatch's, which undoes it."""
    sizes = {
        (linear, "_CHUNK_BYTES"): chunk_bytes,
        (linear, "_CHUNK_BYTES_OF_AN_ACCELERATOR"): accelerator_chunk_bytes,
        (linear, "_FEWEST_ROWS"): fewest_rows,
        (linear, "_STRIP_BYTES"): strip_bytes,
        (_rows, "_BLOCK_BYTES"): block_bytes,
    }
    for (module, name), size in sizes.items():
        if size is not None:
            assert hasattr(module, name)
            set_attribute(module, name, size)


def count_linear_calls(monkeypatch):
    """A list to which each call of the linear kernel adds its options."""
    made, kernel = [], linear.with_statistics

    def counted(*arguments, **options):
        made.append(options)
        return kernel(*arguments, **options)

    monkeypatch.setattr(linear, "with_statistics", counted)
    return made


# Reductions and sums.
REDUCTIONS = reduction.REDUCTIONS
reduce = reduction.reduce
ExactSums = exact_sums.ExactSums

# Where a tensor came from.
head_of = source.head_of
mask_of = source.keras_mask
