"""Files of weights that were saved from a model with Keras' own layer in the place of one of ours."""

from typing import Any

from keras_xent import _keras


def entry_of(layer: Any, own: type, plain: type, name: str, store: Any) -> Any:
    """What a file of weights has for `layer`: its own entry, or that of a layer of class `plain` in its place.

    Keras names entries by class, and `store` is empty where there is none; `name` is that of `plain`.
    """
    if len(store.keys()) or not layer.weights:
        return store
    found = _plain_entry(layer, own, plain, name)
    if found is None or not len(found.keys()):
        raise ValueError(
            f"Layer '{layer.name}' ({type(layer).__name__}) has no entry in this file, whose entries have the names of "
            f"classes. If it was saved from a model with a `keras.layers.{plain.__name__}` in the place of this layer, "
            "load it into that model, and copy its weights with `model.set_weights(other.get_weights())` or call "
            "`keras_xent.fuse_head(other)`."
        )
    return found


def _plain_entry(layer, own, plain, name):
    """The entry that `layer` has if each layer of class `own` was one of class `plain`; None where it is not known."""
    given = _keras.variables_of_loading()
    layers = list(given.get("container") or [])
    place = next((i for i, one in enumerate(layers) if one is layer), None)
    # A `plain` that comes later in the list of layers would read the same entry.
    if place is None or given.get("weights_store") is None or any(type(one) is plain for one in layers[place:]):
        return None
    number = sum(type(one) is plain or isinstance(one, own) for one in layers[:place])
    return given["weights_store"].get(f"{given['inner_path']}/{name}" + (f"_{number}" if number else ""))
