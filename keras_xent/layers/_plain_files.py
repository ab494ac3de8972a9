"""Files of weights that were saved from a model with Keras' own layer in the place of one of ours."""

from typing import Any

from keras_xent import _keras


def entry_of(layer: Any, own: type, plain: type, name: str, store: Any) -> Any:
    """What a file of weights has for `layer`: its own entry, or that of a layer of class `plain` in its place.

    Keras names entries by class, and `store` is empty where there is none; `name` is that of `plain`.
    """
    if len(store.keys()) or not layer.weights:
        return store
    found = _keras.entry_of_class(layer, own, plain, name)
    if found is None or not len(found.keys()):
        raise ValueError(
            f"Layer '{layer.name}' ({type(layer).__name__}) has no entry in this file, whose entries have the names of "
            f"classes. If it was saved from a model with a `keras.layers.{plain.__name__}` in the place of this layer, "
            "load it into that model, and copy its weights with `model.set_weights(other.get_weights())` or call "
            "`keras_xent.fuse_head(other)`."
        )
    return found
