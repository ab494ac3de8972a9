"""Errors for names that are in a module of Keras, but not in the module of the same name here."""

from types import ModuleType


def attribute_error(module: str, name: str, of_keras: ModuleType) -> AttributeError:
    """The error for a name that `keras_xent.<module>` does not have."""
    hint = ""
    if not name.startswith("_") and hasattr(of_keras, name):
        hint = f": Keras has it. Use `keras.{module}.{name}`"
    return AttributeError(f"module 'keras_xent.{module}' has no attribute '{name}'{hint}.")
