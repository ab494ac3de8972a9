"""Kernels called by hand while Keras spreads batches over devices: at once, and by each device on its own rows."""

import json
import subprocess
import sys

import pytest

from tests.backend import BACKEND, environment
from tests.scaling.training import XLA_FLAGS

pytestmark = pytest.mark.skipif(BACKEND != "jax", reason="keras.distribution is for JAX")
PROGRAM = """
import json, jax, keras, numpy as np, keras_xent as kx
from jax.sharding import PartitionSpec as P

rng = np.random.default_rng(5)
hidden, kernel = rng.standard_normal((8, 6, 5), "float32"), rng.standard_normal((5, 12), "float32")
labels, weights = rng.integers(0, 12, (8, 6)), rng.uniform(0.1, 2, (8, 6)).astype("float32")

def loss(hidden, kernel, weights, labels, reduction, **options):
    options = {"token_weights": weights, "reduction": reduction, **options}
    return kx.kernels.linear_cross_entropy(hidden, kernel, labels, **options)

gradients = jax.value_and_grad(loss, (0, 1, 2))
expected = gradients(hidden, kernel, weights, labels, "token_mean")
total, of_total = gradients(hidden, kernel, weights, labels, "sum")

layout = keras.distribution.LayoutMap(keras.distribution.DeviceMesh((2, 2), ("model", "batch")))
layout.update(kx.layers.vocabulary_layout("logits"))
parallel = keras.distribution.ModelParallel(layout_map=layout, batch_dim_name="batch")
keras.distribution.set_distribution(parallel)

def apart(found, expected):
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs)

def of_device(*arrays):
    # Chunks of 8 tokens, of which each device has 24.
    return jax.lax.psum(loss(*arrays, "sum", chunk_bytes=4 * 12 * 8), "batch")

mesh, rows = layout.device_mesh.backend_mesh, P("batch")

def by_device(is_checked):
    specs = {"in_specs": (rows, P(), rows, rows), "out_specs": P()}
    mapped = jax.shard_map(of_device, mesh=mesh, check_vma=is_checked, **specs)
    return jax.jit(jax.value_and_grad(mapped, (0, 1, 2)))(hidden, kernel, weights, labels)

on_one = [jax.device_put(array, jax.devices()[3]) for array in (hidden, kernel, weights, labels)]
spread = [jax.device_put(array, jax.NamedSharding(mesh, rows)) for array in (hidden, weights, labels)]
step = jax.jit(gradients, static_argnums=4)
print(json.dumps({
    "at once": apart(gradients(hidden, kernel, weights, labels, "token_mean"), expected),
    "at once, on one of the devices": apart(loss(*on_one, "sum"), total),
    "compiled, spread": apart(step(spread[0], kernel, *spread[1:], "token_mean"), expected),
    "by each device": apart(by_device(False), (total, of_total)),
    "by each device, types checked": apart(by_device(True), (total, of_total)),
}))
"""


@pytest.fixture(scope="module")
def differences():
    command = [sys.executable, "-c", PROGRAM]
    child = subprocess.run(command, env=environment(XLA_FLAGS=XLA_FLAGS), capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout.splitlines()[-1])


HOW = ("at once", "at once, on one of the devices", "compiled, spread", "by each device")


@pytest.mark.parametrize("how", (*HOW, "by each device, types checked"))
def test_a_kernel_gives_what_it_gives_on_one_device(differences, how):
    """Value and gradients, for token weights too; the axis of the batch is not the first of the mesh."""
    assert differences[how] < 1e-6
