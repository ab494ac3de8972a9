"""What the compiled step of a head on several devices sends, and what it holds, as tools/scaling.py reads it."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

import keras_xent as kx
from tests.backend import BACKEND, environment
from tests.tiers import whole

pytestmark = [whole, pytest.mark.skipif(BACKEND != "jax", reason="keras.distribution is for JAX")]
SCALING = Path(__file__).parents[2] / "tools" / "scaling.py"


@pytest.fixture(scope="module")
def programs():
    child = subprocess.run([sys.executable, SCALING, "--json"], env=environment(), capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    found = json.loads(child.stdout.splitlines()[-1])
    return {head: {tuple(one["mesh"]): one for one in meshes} for head, meshes in found.items()}


@pytest.mark.parametrize("mesh", [(1, 2), (1, 4), (2, 2)])
@pytest.mark.parametrize("head", ["head", "tied"])
def test_the_model_axis_exchanges_only_numbers_per_token_and_the_hidden_gradient(programs, head, mesh):
    """No logits and no kernel: along the axis of the classes nothing has more than `[chunk, D]` elements."""
    along_model = [one for one in programs[head][mesh]["sent"] if one["axis"] == "model"]
    assert {one["kind"] for one in along_model} == {"all-reduce"}
    shapes = [shape for one in along_model for shape in one["shapes"]]
    tokens = max(shape[0] for shape in shapes)
    assert all(shape[0] == tokens and (shape[1:] or [1])[0] in (1, 64) for shape in shapes)
    assert sum(shape[1:] == [64] for shape in shapes) == 1


@pytest.mark.parametrize("mesh", [(2, 2), (4, 1)])
@pytest.mark.parametrize("head", ["head", "tied"])
def test_the_batch_axis_exchanges_only_sums(programs, head, mesh):
    """Along the axis of the batch go sums alone: of losses and weights, and the gradients of kernel and bias, once."""
    along_batch = [one for one in programs[head][mesh]["sent"] if one["axis"] == "batch"]
    assert {(one["kind"], one["where"]) for one in along_batch} == {("all-reduce", "once")}
    sizes = sorted(int(np.prod(shape)) for one in along_batch for shape in one["shapes"] if shape)
    assert sizes == [65_536 // mesh[1], 64 * 65_536 // mesh[1]]


@pytest.mark.parametrize("head", ["head", "tied"])
def test_memory_per_device_falls_with_the_number_of_shards(programs, head):
    one, two, four = (sum(programs[head][1, shards]["bytes"].values()) for shards in (1, 2, 4))
    assert two < 0.55 * one
    assert four < 0.55 * two


def test_one_device_exchanges_nothing(programs):
    assert programs["head"][1, 1]["sent"] == []


def test_the_estimate_follows_from_what_a_program_sends(programs):
    """Bytes of the program's collectives, as often as its loop runs, twice (n - 1) / n of them for a ring."""
    sent = programs["head"][2, 2]["sent"]
    in_loop = [one for one in sent if one["where"] == "each chunk"]
    tokens = max(shape[0] for one in in_loop for shape in one["shapes"])
    chunks = 8192 / 2 / tokens
    assert chunks == int(chunks)
    model = sum(one["bytes"] for one in in_loop) * chunks
    # The sum of exponentials is in the program in each branch of a condition.
    model -= 4 * tokens * chunks
    batch = max(one["bytes"] for one in sent if one["axis"] == "batch")
    paper = runpy.run_path(str(SCALING))["on_paper"](2, 2, tokens=8192, features=64, classes=65_536)
    np.testing.assert_allclose(paper, [model / 1e6, batch / 1e6], rtol=0.02)


@pytest.mark.parametrize(
    "build, argument",
    [
        (lambda: kx.layers.LogitsDense(61, name="logits").build((None, 8)), "units"),
        (lambda: kx.layers.TiedLogits(61, 8, name="logits").build(), "input_dim"),
    ],
)
def test_classes_that_devices_cannot_share_evenly_are_refused(build, argument):
    # Nothing is put on these devices.
    mesh = keras.distribution.DeviceMesh((2, 2), ("batch", "model"), [f"cpu:{i}" for i in range(4)])
    layout = keras.distribution.LayoutMap(mesh)
    layout.update(kx.layers.vocabulary_layout("logits"))
    spread = keras.distribution.ModelParallel(layout_map=layout, batch_dim_name="batch")
    sentence = (
        f"`{argument}` must be a multiple of 2, the size of mesh axis 'model', over which the layout map spreads the "
        f"classes of layer 'logits'. Received: {argument}=61. Make it 62 and leave the classes at the end unused, or "
        "leave the layer out of the layout map."
    )
    with spread.scope(), pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        build()
