"""Calls in the order of PyTorch: predictions where labels belong, and labels where predictions do."""

from keras import ops

from keras_xent._backend import is_eager
from keras_xent._types import Tensor
from keras_xent.kernels._dtypes import dtype_of, is_float, to_tensor
from keras_xent.kernels._labels import is_soft_label


def refuse_swapped(y_true: Tensor, y_pred: Tensor, takes_probabilities: bool) -> None:
    """Raises an error for logits where labels belong and integers where predictions do.

    `takes_probabilities` says whether labels are numbers from 0 to 1 rather than indices of classes.
    """
    if hasattr(y_pred, "assign") or is_float(to_tensor(y_pred)) or not is_float(y_true):
        return
    # Labels have one axis less, or are no numbers from 0 to 1.
    is_swapped = len(y_true.shape) == len(y_pred.shape) + 1
    if not is_swapped and takes_probabilities and is_eager(y_true) and 0 not in y_true.shape:
        is_swapped = not bool(ops.all(is_soft_label(y_true)))
    if is_swapped:
        raise _error(y_true, y_pred)


def refuse_swapped_values(y_true: Tensor, y_pred: Tensor) -> None:
    """Raises an error for predictions that are all 0 or 1, beside labels that are known not to be from 0 to 1.

    It reads values, and is for eager calls in which something is wrong already. Logits of an untrained model are all 0.
    """
    if is_eager(y_pred):
        is_one = ops.equal(y_pred, 1)
        if bool(ops.any(is_one)) and bool(ops.all(ops.logical_or(is_one, ops.equal(y_pred, 0)))):
            raise _error(y_true, y_pred)


def _error(y_true, y_pred):
    return ValueError(
        "`y_true` and `y_pred` seem to be swapped: losses of Keras are called `loss(y_true, y_pred)`. "
        f"Received: y_true of dtype {dtype_of(y_true)} and shape {tuple(y_true.shape)}, and y_pred of dtype "
        f"{dtype_of(to_tensor(y_pred))} and shape {tuple(y_pred.shape)}."
    )
