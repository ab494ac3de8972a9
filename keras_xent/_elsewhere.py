"""What a module of Keras has and the module of the same name here has not: errors that say where it is."""

from types import ModuleType


def attribute_error(module: str, name: str, of_keras: ModuleType) -> AttributeError:
    """The error for a name that `keras_xent.<module>` does not have."""
    hint = ""
    if not name.startswith("_") and hasattr(of_keras, name):
        hint = f": it holds what has to do with cross-entropy. Take it from Keras, as `keras.{module}.{name}`"
    return AttributeError(f"module 'keras_xent.{module}' has no attribute '{name}'{hint}.")
