"""What the tests read of the package beyond its public names: the one file to change when an internal one moves."""

import weakref

from keras.src.backend import set_keras_mask

from keras_xent import _backend, _keras, _loss_statistics, provenance
from keras_xent.kernels import _compiled, _options, _token_chunks, _xla_cpu, linear, reduction
from keras_xent.kernels import sigmoid as _sigmoid
from keras_xent.kernels import softmax as _softmax
from keras_xent.kernels import sparse_softmax as _sparse
from keras_xent.metrics import _exact_sums

__all__ = ["set_keras_mask"]

# How kernels are compiled.
clear_cache = _compiled.clear_cache
CompiledKernel = _compiled.CompiledKernel
SoftmaxOptions, SigmoidOptions = _options.SoftmaxOptions, _options.SigmoidOptions
on_accelerator = _backend.on_accelerator
without_xla = _backend.without_xla
cast_to_nearest_even = _xla_cpu.cast_to_nearest_even

# The compiled halves of the kernels.
sparse_forward, sparse_backward = _sparse._sparse_forward, _sparse._sparse_backward
dense_forward, dense_backward = _softmax._dense_forward, _softmax._dense_backward
sigmoid_forward, sigmoid_backward = _sigmoid._sigmoid_forward, _sigmoid._sigmoid_backward


def number_of_traces():
    """How many functions TensorFlow has traced for many numbers of rows."""
    from keras_xent._backend import _tensorflow_traces

    return len(_tensorflow_traces._functions)


def without_metrics(monkeypatch):
    """No metric is alive, as in a process of its own: TensorFlow does not say whose step it is that needs ranks."""
    monkeypatch.setattr(_loss_statistics, "_consumers", weakref.WeakSet())


def chunks(tokens, classes, is_masked):
    """The size of a chunk of tokens of the linear kernel, and their number."""
    return _token_chunks.chunk_sizes(tokens, classes, is_masked=is_masked)


def set_sizes(
    set_attribute,
    *,
    chunk_bytes=None,
    fewest_rows=None,
    strip_bytes=None,
    block_bytes=None,
):
    """Sets what the kernels read at once, on a CPU and on accelerators.

    `set_attribute` is `setattr`, or monkeypatch's, which undoes it.
    """
    sizes = {
        (_token_chunks, "CPU_CHUNK_BYTES"): chunk_bytes,
        (_token_chunks, "ACCELERATOR_CHUNK_BYTES"): chunk_bytes,
        (_token_chunks, "MIN_CHUNK_TOKENS"): fewest_rows,
        (_token_chunks, "ACCELERATOR_MIN_CHUNK_TOKENS"): None if fewest_rows is None else (fewest_rows, fewest_rows),
        (_xla_cpu, "_STRIP_BYTES"): strip_bytes,
        (_xla_cpu, "_FEW_STRIPS"): None if strip_bytes is None else 1,
        (_xla_cpu, "_BLOCK_BYTES"): block_bytes,
    }
    for (module, name), size in sizes.items():
        if size is not None:
            assert hasattr(module, name)
            set_attribute(module, name, size)


def count_linear_calls(monkeypatch):
    """A list to which each call of the linear kernel adds its options."""
    made, kernel = [], linear.linear_cross_entropy

    def counted(*arguments, **options):
        made.append(options)
        return kernel(*arguments, **options)

    monkeypatch.setattr(linear, "linear_cross_entropy", counted)
    return made


# Reductions and sums.
REDUCTIONS = reduction.REDUCTIONS
reduce = reduction.reduce
ExactSums = _exact_sums.ExactSums

# Where a tensor came from.
head_of = provenance.head_of
mask_of = _keras.mask_of
