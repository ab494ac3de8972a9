"""Layouts that shard the classes of a head over devices."""

import re
from typing import Any

import keras


def vocabulary_layout(name: str, axis: str = "model") -> dict[str, tuple[Any, ...]]:
    """Entries of a `keras.distribution.LayoutMap` that spread the classes of a head over an axis of the mesh.

    Each device then holds a part of the classes of a `LogitsDense` or `TiedLogits` layer, of their gradient and of the
    optimizer's state, and computes that part of the logits. Devices send each other a few numbers per token (the
    largest logit, the sum of exponentials, the label's logit) and the gradient of the hidden states. Needs the JAX
    backend, and a number of classes that the size of the axis divides.

    Args:
        name: name of the layer.
        axis: name of the axis of the device mesh.

    Returns:
        Layouts by the paths of the layer's weights: `[D, V]` kernels and `[V]` biases of `LogitsDense`, `[V, D]`
        embeddings of `TiedLogits`.

    Example:

    >>> import keras
    >>> import keras_xent as kx
    >>> mesh = keras.distribution.DeviceMesh((1, 1), ("batch", "model"), ["cpu:0"])
    >>> layout = keras.distribution.LayoutMap(mesh)
    >>> layout.update(kx.layers.vocabulary_layout("logits"))
    >>> layout["functional/logits/kernel"].axes
    (None, 'model')

    References: the parallel embedding and loss of Megatron-LM, arXiv:1909.08053, section 3.
    """
    # The whole path, whether Keras takes the expression for all of it or looks for it anywhere in it.
    inside = rf"^(.*/)?{re.escape(name)}/"
    return {
        f"{inside}kernel$": (None, axis),
        f"{inside}bias$": (axis,),
        f"{inside}embeddings$": (axis, None),
        f"{inside}reverse_embeddings$": (None, axis),
    }


def must_divide(name: str, layer: Any, weight: str, axis: int, classes: int) -> None:
    """Raises a ValueError where a layout spreads the classes of a layer's weight unevenly; `name` is the argument's."""
    spread = keras.distribution.distribution()
    layout = spread and spread.get_tensor_layout(f"{layer.path}/{weight}")
    along = layout and layout.axes[axis]
    if not along:
        return
    mesh = layout.device_mesh
    size = mesh.shape[mesh.axis_names.index(along)]
    if classes % size:
        raise ValueError(
            f"`{name}` must be a multiple of {size}, the size of mesh axis '{along}', over which the layout map "
            f"spreads the classes of layer '{layer.name}'. Received: {name}={classes}. "
            f"Make it {-(-classes // size) * size} and leave the classes at the end unused, or leave the layer out of "
            "the layout map."
        )
