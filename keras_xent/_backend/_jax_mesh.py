"""Meshes of Explicit axes, on which JAX asks for the sharding of each intermediate result, and of Manual ones."""

import functools
from typing import Any

import jax

from keras_xent._types import Function


def on_any_mesh(function: Function) -> Function:
    """`function` of tensors, computed with the Explicit axes of their mesh left to XLA, as Auto axes are.

    A result whose first axis is as long as that of a sharded tensor is sharded as that, any other is on all devices.
    """

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        shardings = [(leaf, _explicit(leaf)) for leaf in jax.tree.leaves((args, kwargs))]
        shardings = [(leaf, sharding) for leaf, sharding in shardings if sharding is not None]
        if not shardings or not hasattr(jax.sharding, "use_abstract_mesh"):
            return function(*args, **kwargs)
        mesh, spec = shardings[0][1].mesh, jax.sharding.PartitionSpec
        with jax.sharding.use_abstract_mesh(_automatic(mesh)):
            args, kwargs = jax.tree.map(
                lambda leaf: leaf if _explicit(leaf) is None else jax.sharding.reshard(leaf, spec()), (args, kwargs)
            )
            results = function(*args, **kwargs)
        axes = {leaf.shape[0]: s.spec[0] for leaf, s in shardings if leaf.ndim and s.spec and s.spec[0] is not None}

        def placed(result):
            axis = axes.get(result.shape[0]) if result.ndim else None
            return jax.sharding.reshard(result, jax.sharding.NamedSharding(mesh, spec(axis)))

        return jax.tree.map(placed, results)

    return run  # type: ignore[return-value]


def _explicit(leaf):
    """The sharding of a tensor on a mesh of Explicit axes, which its type names; None for all else."""
    if not isinstance(leaf, jax.Array):
        return None
    sharding = getattr(jax.typeof(leaf), "sharding", None) if hasattr(jax, "typeof") else None
    is_explicit = jax.sharding.AxisType.Explicit in getattr(getattr(sharding, "mesh", None), "axis_types", ())
    return sharding if is_explicit else None


def _automatic(mesh):
    explicit, automatic = jax.sharding.AxisType.Explicit, jax.sharding.AxisType.Auto
    kinds = tuple(automatic if kind == explicit else kind for kind in mesh.axis_types)
    return jax.sharding.AbstractMesh(mesh.axis_sizes, mesh.axis_names, axis_types=kinds)


def is_inside_shard_map() -> bool:
    """Whether each device has its own part of arrays now."""
    return bool(jax.sharding.get_abstract_mesh().manual_axes)


def vary_alike(arrays: Any, *others: Any) -> Any:
    """The arrays, as ones that differ between devices along each axis along which one of them, or of others, does.

    Inside `jax.shard_map` types say along which axes of the mesh arrays differ, and those of a loop or of a gradient
    are not to change. Of an array that devices share JAX then sums the gradients of all.
    """
    if not is_inside_shard_map():
        return arrays
    axes = frozenset().union(*map(_varying, jax.tree.leaves((arrays, others))))

    def varying(leaf):
        missing = axes - _varying(leaf)
        return jax.lax.pcast(leaf, tuple(missing), to="varying") if missing else leaf

    return jax.tree.map(varying, arrays)


def _varying(leaf):
    kind = leaf if isinstance(leaf, jax.ShapeDtypeStruct) else jax.typeof(leaf)
    # JAX before 0.10 has no such attribute.
    return getattr(getattr(kind, "manual_axis_type", None), "varying", frozenset())
