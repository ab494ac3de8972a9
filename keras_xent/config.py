"""The switch for compilation by XLA."""

from keras_xent import _backend


def use_xla(value: bool) -> None:
    """Sets whether kernels are compiled by XLA (the default) or run operation by operation.

    For debugging tools that cannot look into a compiled program. Those of TensorFlow have the effect of `False` by
    themselves: `tf.debugging.enable_check_numerics`, Debugger V2, `tf.config.run_functions_eagerly(True)`. Values are
    the same to rounding; memory and time are those of plain operations. Steps that were traced before do not change:
    call this first, or set the environment variable `KERAS_XENT_USE_XLA=0`.

    Args:
        value: True or False.

    Returns:
        None.

    Raises:
        ValueError: another value.

    Example:

    >>> import keras_xent as kx
    >>> kx.config.use_xla(False)
    >>> kx.config.uses_xla()
    False
    >>> kx.config.use_xla(True)
    """
    if not isinstance(value, bool):
        raise ValueError(f"`value` must be True or False. Received: value={value!r}.")
    _backend.set_uses_xla(value)


def uses_xla() -> bool:
    """Returns whether kernels that are called here are compiled by XLA.

    Returns:
        True (the default) or False.

    Example:

    >>> import keras_xent as kx
    >>> kx.config.uses_xla()
    True
    """
    return _backend.uses_xla()
