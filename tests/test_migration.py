"""The tables of docs/coming-from-elsewhere.md: what one writes elsewhere and here gives the same number."""

import importlib.util
import json
import pathlib
import re
import subprocess
import sys

import keras
import numpy as np
import pytest

import keras_xent
from tests.backend import to_numpy
from tests.tiers import fast_for
from tests.trl import configs

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "coming-from-elsewhere.md"
ROWS = re.findall(r"^\| `(.+)` \| `(.+)` \|$", PAGE.read_text(), re.MULTILINE)

# PyTorch has an environment of its own, which tools/bench/install makes.
TORCH = ROOT / ".venv-torch" / "bin" / "python"
IN_TORCH = """
import json, sys
import numpy, torch
import torch.nn.functional as F
names = {name: torch.tensor(array) for name, array in numpy.load(sys.argv[1]).items()}
numpy.savez(sys.argv[2], *(eval(row, {"F": F, **names}).numpy() for row in json.loads(sys.argv[3])))
"""


def rows(library):
    """The rows from a library, each one with what stands on its left as its name."""
    found = [row for row in ROWS if re.split(r"[.(]", row[0])[0] == library]
    return pytest.mark.parametrize("there, here", found, ids=[left for left, _ in found])


def inputs():
    """The arrays that the page names, of sizes that no other axis has."""
    rng = np.random.default_rng(0)
    examples, steps, classes, features = 6, 4, 5, 3
    x, xt = rng.normal(0, 2, (examples, classes)), rng.normal(0, 2, (examples, steps, classes))
    kt = rng.integers(0, classes, (examples, steps))
    kt[0, 2:] = kt[3, 1:] = -100
    arrays = {
        "x": x,
        "p": np.exp(x) / np.exp(x).sum(axis=1, keepdims=True),
        "q": rng.dirichlet(np.ones(classes), examples),
        "y": rng.integers(0, 2, (examples, classes)),
        "w": rng.uniform(0.5, 3, classes),
        "t": np.array([1, 0, 2, 1, 0.5, 1]),
        "z": rng.normal(0, 2, (examples, classes)),
        "v": rng.uniform(0, 2, (examples, classes)),
        "xi": rng.normal(0, 2, (examples, classes, 2, 3)),
        "xt": xt,
        "zt": rng.normal(0, 2, xt.shape),
        "h": rng.normal(0, 1, (examples, features)),
        "m": rng.normal(0, 1, (classes, features)),
    }
    ki = rng.integers(0, classes, (examples, 2, 3))
    ki[0] = ki[2, 1] = 255
    arrays.update(of_completions(rng, examples, steps))
    floats = {name: array.astype("float32") for name, array in arrays.items()}
    return {**floats, "k": kt[:, 0].clip(0), "kt": kt, "ki": ki}


def of_completions(rng, examples, steps):
    """Log-probabilities of completions and of their tokens."""
    arrays = {name: -rng.uniform(1, 30, examples) for name in ("c", "r", "rc", "rr")}
    lengths = {which: rng.integers(1, 9, examples) for which in "cr"}
    arrays |= {f"m{name}": array / lengths[name[-1]] for name, array in arrays.items()}
    arrays |= {f"tokens_{which}": length for which, length in lengths.items()}
    arrays["good"], arrays["kl"] = rng.random(examples) < 0.5, rng.normal(1, 2, examples)
    arrays["nll"] = np.array(1.5)
    arrays |= {name: -rng.uniform(0, 2, (examples, steps)) for name in ("lp", "old", "ref")}
    mask = np.arange(steps) < rng.integers(1, steps + 1, (examples, 1))
    arrays |= {f"m{name}": arrays[name].mean(axis=1, where=mask) for name in ("lp", "old")}
    entropy = rng.uniform(0, 3, mask.shape)
    high = entropy >= np.quantile(entropy[mask], 0.8)
    return arrays | {"mask": mask, "a": rng.normal(0, 1, examples), "entropy": entropy, "high": high}


INPUTS = inputs()


def same(here, there, of=lambda loss: loss):
    losses = {name: getattr(keras_xent.losses, name) for name in keras_xent.losses.__all__}
    names = {name: getattr(keras_xent, name) for name in ("kernels", "metrics", "preference")}
    ours, there = of(to_numpy(eval(here, {**names, **losses}, INPUTS))), np.asarray(there, "float64")
    assert ours.shape == there.shape
    np.testing.assert_allclose(ours, there, rtol=2e-5, atol=2e-6)


def test_the_page_names_every_library_and_each_row_is_run():
    libraries = {re.split(r"[.(]", there)[0] for there, _ in ROWS}
    assert libraries == {"keras", "keras_hub", "tf", "F", "optax", "trl"}
    headings = re.findall(r"^\|---\|---\|$", PAGE.read_text(), re.MULTILINE)
    assert len(ROWS) == PAGE.read_text().count("\n|") - 2 * len(headings)


@fast_for(
    "*Focal*(apply*",
    "*SparseCategoricalCrossentropy(from_logits*",
    "*.binary_crossentropy*",
    "*CategoricalCrossentropy(label*",
)
@rows("keras")
def test_keras(there, here):
    same(here, to_numpy(keras.ops.convert_to_tensor(eval(there, {"keras": keras}, INPUTS))))


@rows("keras_hub")
def test_keras_hub(there, here):
    hub = pytest.importorskip("keras_hub", reason="keras-hub is not installed: pip install '.[hub]'")
    same(here, to_numpy(keras.ops.convert_to_tensor(eval(there, {"keras_hub": hub}, INPUTS))))


@rows("tf")
def test_tensorflow(there, here):
    tf = pytest.importorskip("tensorflow")
    same(here, eval(there, {"tf": tf}, INPUTS))


@rows("optax")
def test_optax(there, here):
    optax = pytest.importorskip("optax", reason="optax is not installed: pip install optax")
    same(here, eval(there, {"optax": optax}, INPUTS))


@rows("trl")
def test_trl(there, here):
    same(here, eval(there, {"trl": configs(INPUTS)}), of=np.mean)


@pytest.fixture(scope="module")
def in_torch(tmp_path_factory):
    """What PyTorch answers, by row."""
    python = sys.executable if importlib.util.find_spec("torch") else str(TORCH)
    if not pathlib.Path(python).exists():
        pytest.skip("PyTorch is not installed: tools/bench/install")
    folder = tmp_path_factory.mktemp("torch")
    theirs = [there for there, _ in ROWS if there.startswith("F.")]
    np.savez(folder / "inputs.npz", **INPUTS)
    command = [python, "-c", IN_TORCH, folder / "inputs.npz", folder / "answers.npz", json.dumps(theirs)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    answers = np.load(folder / "answers.npz")
    return {there: answers[f"arr_{i}"] for i, there in enumerate(theirs)}


@rows("F")
def test_pytorch(there, here, in_torch):
    same(here, in_torch[there])


def test_smoothing_of_the_other_classes_alone_is_that_of_fairseq():
    x, k, share = INPUTS["x"].astype("float64"), INPUTS["k"], 0.1
    examples, classes = x.shape
    targets = np.full(x.shape, share / (classes - 1))
    targets[np.arange(examples), k] = 1 - share
    log_p = x - np.log(np.exp(x).sum(axis=1, keepdims=True))
    loss = keras_xent.losses.SparseCategoricalCrossentropy(True, label_smoothing=share * classes / (classes - 1))
    assert float(loss(k, INPUTS["x"])) == pytest.approx(-(targets * log_p).sum(axis=1).mean(), rel=1e-6)


def test_trl_counts_completions_without_a_token():
    of = {**INPUTS, "mask": INPUTS["mask"] * (np.arange(len(INPUTS["mask"])) != 1)[:, None]}
    there = configs(of).GRPOConfig(loss_type="grpo")
    here = float(keras_xent.preference.grpo(of["lp"], of["old"], of["a"], mask=of["mask"]))
    share = np.mean(of["mask"].any(axis=1))
    assert share < 1 and here * share == pytest.approx(there, rel=1e-5)


def test_torchmetrics_has_a_bin_for_predictions_of_probability_1():
    probabilities, labels = np.array([0.95, 1.0, 1.0, 0.3], "float32"), np.array([1, 1, 0, 1])
    metric = keras_xent.metrics.CalibrationError(bins=10, from_logits=False)
    metric.update_state(labels, probabilities)
    assert float(metric.result()) == pytest.approx((0.7 + abs(2.95 - 2)) / 4)  # there (0.7 + 0.05 + 1) / 4
    confidence, hits, weight = metric.reliability()
    gap, share = np.abs(confidence - hits), weight / weight.sum()
    assert gap.max() == pytest.approx(0.7) and (gap**2 * share).sum() == pytest.approx(0.7**2 / 4 + 0.95**2 / 12)
