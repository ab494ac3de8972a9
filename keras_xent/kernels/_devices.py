"""On JAX: each device takes the rows that it has, where Keras spreads a batch over several.

Left to itself XLA brings rows from one device to another wherever their order changes, and where a loop takes a few at
a time it has all devices compute the same ones.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import keras
from keras import ops

from keras_xent.kernels._compile import is_eager

if keras.backend.backend() == "jax":
    import jax
    from jax.sharding import PartitionSpec


class Devices(NamedTuple):
    """The devices of a step and the name of the axis along which a batch is spread over them."""

    mesh: Any
    axis: str


def of_batch(array: Any) -> Devices | None:
    """The devices over which Keras spreads the rows of an array, evenly; None if there are none.

    None too for values at hand, which may be one device's or one process's own, and inside `jax.shard_map`, where each
    device has its own rows already.
    """
    spread = keras.distribution.distribution() if keras.backend.backend() == "jax" else None
    if spread is None or is_eager(array) or jax.sharding.get_abstract_mesh().manual_axes:
        return None
    mesh, axis = spread.device_mesh.backend_mesh, spread.batch_dim_name
    if axis not in mesh.axis_names:
        return None
    rows, count = ops.shape(array)[0], mesh.shape[axis]
    return Devices(mesh, axis) if count > 1 and isinstance(rows, int) and rows % count == 0 else None


def each(devices: Devices | None, function: Callable, rows: Any, others: Any, *, by_rows: Any) -> Any:
    """`function(rows, others)`, by each device on the rows that it has; with None simply that.

    `rows` are arrays with a row for each of the batch, `others` are arrays that each device has, whole or in parts that
    XLA divides further. `by_rows` tells of every result, in the same structure, whether it has rows: the others have to
    be sums over the devices, made by `sum_over`.
    """
    if devices is None:
        return function(rows, others)
    spread, alike = PartitionSpec(devices.axis), PartitionSpec()
    return jax.shard_map(
        function,
        mesh=devices.mesh,
        in_specs=(spread, alike),
        out_specs=jax.tree.map(lambda has_rows: spread if has_rows else alike, by_rows),
        axis_names={devices.axis},
        check_vma=False,
    )(rows, others)


def sum_over(devices: Devices | None, value: Any) -> Any:
    """The sum of the devices' values, inside `each`."""
    return value if devices is None or value is None else jax.lax.psum(value, devices.axis)


def largest_over(devices: Devices | None, value: Any) -> Any:
    """The largest of the devices' values, inside `each`."""
    return value if devices is None else jax.lax.pmax(value, devices.axis)
