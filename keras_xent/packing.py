"""Documents that are packed into the rows of a batch, one after the other."""

import numpy as np

from keras_xent import arguments
from keras_xent._backend import weights_of_runs
from keras_xent._types import Tensor
from keras_xent.kernels._shapes import same_shape


def segment_weights(segment_ids: Tensor, mask: Tensor = None, *, padding: int | None = 0) -> Tensor:
    """Sample weights that make `token_mean` the mean over packed documents, each of which then counts the same.

    For the mean over documents of each one's token mean, which `reduction="sequence_mean"` is for one document a row.
    Use it where the data are made, in `tf.data.Dataset.map` or on arrays, and give the weights as `sample_weight`:

        dataset.map(lambda x, y, ids: (x, y, kx.segment_weights(ids, y != PADDING)))

    Formula: `1 / (number of valid tokens of the document)` for each valid token, else 0. The weights of a document sum
    to 1, so that `sum_n t_n l_n / sum_n t_n` over the batch is the mean over its documents.

    With class weights of the loss, a document counts by the class weights of its tokens. Leave the weights to the loss:
    a `Perplexity` in `weighted_metrics` would be weighted too.

    Args:
        segment_ids: `[..., T]` numbers of the documents. Neighbors in a row with the same number are one document; one
            that goes on in the next row is another there.
        mask: which tokens are valid, of the same shape: True for those whose label the loss counts. None is all.
        padding: the number in `segment_ids` that marks padding; None where there is none.

    Returns:
        `[..., T]` float32, of the kind of array that was given: NumPy, TensorFlow or JAX.

    Raises:
        ValueError: a `mask` of another shape.

    Warns of a NumPy array with negative numbers and `padding=0`, which leaves out the documents of number 0.

    Example:

    >>> import numpy as np
    >>> import keras_xent as kx
    >>> kx.segment_weights(np.array([[1, 1, 2, 2, 2, 2, 0]]))
    array([[0.5 , 0.5 , 0.25, 0.25, 0.25, 0.25, 0.  ]], dtype=float32)

    References: linkedin/Liger-Kernel issue 329.
    """
    segment_ids = segment_ids if hasattr(segment_ids, "shape") else np.asarray(segment_ids)
    mask = mask if mask is None or hasattr(mask, "shape") else np.asarray(mask)
    if isinstance(segment_ids, np.ndarray) and padding == 0 and np.any(segment_ids < 0):
        arguments.warn(
            f"`segment_ids` has negative numbers, down to {segment_ids.min()}, and the documents of number 0 are left "
            "out. If a negative number marks padding, give it as `padding`; padding=None counts all documents."
        )
    have_ranks = mask is not None and _has_rank(segment_ids) and _has_rank(mask)
    if have_ranks and not same_shape(mask.shape, segment_ids.shape):
        raise ValueError(
            "`mask` must have the shape of `segment_ids`. Received: mask of shape "
            f"{tuple(mask.shape)} and segment_ids of shape {tuple(segment_ids.shape)}."
        )
    return weights_of_runs(segment_ids, mask, padding)


def _has_rank(array):
    """Returns False in a graph of TensorFlow where nothing is known of the shape, as after `tf.numpy_function`."""
    return getattr(array.shape, "rank", 0) is not None
