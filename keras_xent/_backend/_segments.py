"""Runs of equal numbers, in arrays of NumPy, TensorFlow or JAX, whichever backend Keras runs on.

Inside `tf.data` the arrays are TensorFlow's on every backend.
"""

import sys
from typing import Any

import numpy as np

from keras_xent._types import Tensor


def weights_of_runs(ids: Tensor, mask: Tensor, padding: int | None) -> Tensor:
    """One over the number of valid places in each run of equal ids along the last axis, at these; else 0."""
    module = _numpy_of(ids, mask)
    ids = module.asarray(ids)
    valid = module.ones_like(ids, dtype=bool) if padding is None else module.not_equal(ids, padding)
    if mask is not None:
        valid = module.logical_and(valid, module.asarray(mask, dtype=bool))
    valid = module.asarray(module.reshape(valid, (-1,)), dtype="float32")  # [N]
    begins = module.ones_like(ids[..., :1], dtype=bool)
    begins = module.concatenate([begins, module.not_equal(ids[..., 1:], ids[..., :-1])], axis=-1)
    run = module.cumsum(module.asarray(module.reshape(begins, (-1,)), dtype="int32")) - 1  # [N]
    number = module.take(_sums(valid, run), run)
    # Of TensorFlow's arrays sizes may not be known yet, nor their number.
    is_known = getattr(ids.shape, "rank", 0) is not None and None not in ids.shape
    shape = ids.shape if is_known else sys.modules["tensorflow"].shape(ids)
    return module.reshape(valid / module.maximum(number, np.float32(1)), shape)


def _numpy_of(*arrays: Any) -> Any:
    origins = {type(array).__module__.partition(".")[0] for array in arrays}
    if "tensorflow" in origins:
        return sys.modules["tensorflow"].experimental.numpy
    return sys.modules["jax"].numpy if origins & {"jax", "jaxlib"} else np


def _sums(values, run):
    module = _numpy_of(values)
    if module is np:
        return np.bincount(run, values, len(run)).astype("float32")
    if module.__name__.startswith("jax"):
        return module.zeros_like(values).at[run].add(values)
    tensorflow = sys.modules["tensorflow"]
    return tensorflow.math.unsorted_segment_sum(values, run, tensorflow.shape(values)[0])
