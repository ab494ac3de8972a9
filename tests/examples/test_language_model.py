"""The language model of examples/, every step of it at toy size, from the text to the logs."""

import importlib.util
import json
import pathlib
import re
import subprocess
import sys

import pytest
import tensorflow as tf
from tensorboard.backend.event_processing.event_accumulator import TENSORS, EventAccumulator

from tests.backend import environment
from tests.tiers import whole

ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "language_model.py"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder that `--smoke` has filled, and what it printed."""
    output = tmp_path_factory.mktemp("language_model")
    done = subprocess.run(
        [sys.executable, SCRIPT, "--smoke", "--output", output], env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return output, done.stdout


def history_of(output):
    return json.loads((output / "history.json").read_text())


def logged(folder, tag):
    """The values of a tag by step; size 0 keeps the reader from sampling them."""
    events = EventAccumulator(str(folder), size_guidance={TENSORS: 0}).Reload()
    return {event.step: float(tf.make_ndarray(event.tensor_proto)) for event in events.Tensors(tag)}


@whole
def test_it_leaves_a_model_a_picture_and_its_history(run):
    output, _ = run
    assert (output / "model.keras").stat().st_size > 0
    assert (output / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert set(history_of(output)) == {"loss", "perplexity", "val_loss", "val_perplexity"}


@whole
@pytest.mark.parametrize("folder, name", [("train", "perplexity"), ("validation", "val_perplexity")])
def test_tensorboard_shows_the_perplexity_of_the_history(run, folder, name):
    output, _ = run
    values = logged(output / "logs" / folder, "epoch_perplexity")
    assert list(values) == [0, 1]
    assert list(values.values()) == pytest.approx(history_of(output)[name], rel=1e-6)


@whole
def test_it_prints_the_perplexities_and_where_to_see_them(run):
    output, printed = run
    perplexity = history_of(output)["val_perplexity"][-1]
    assert f"val_perplexity: {perplexity:.4f}" in printed  # the progress bar of the last epoch
    for name in ("this model", "this model in the fresh process"):
        row = re.search(rf"^  {name} +([\d.]+)$", printed, re.MULTILINE)
        assert float(row[1]) == pytest.approx(perplexity, rel=1e-4)
    assert f"--logdir {output / 'logs'}" in printed


@whole
def test_the_model_beats_the_unigram_model(run):
    output, printed = run
    unigram = re.search(r"^  unigram model .* ([\d.]+)$", printed, re.MULTILINE)
    assert history_of(output)["val_perplexity"][-1] < float(unigram[1])


@whole
@pytest.mark.parametrize("seed", range(3))
def test_whole_it_is_a_fifth_as_perplexed_as_the_unigram_model(seed, tmp_path):
    command = [sys.executable, SCRIPT, "--seed", str(seed), "--output", tmp_path]
    printed = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True).stdout
    unigram = re.search(r"^  unigram model .* ([\d.]+)$", printed, re.MULTILINE)
    assert history_of(tmp_path)["val_perplexity"][-1] < 0.2 * float(unigram[1])


def test_no_held_out_paragraph_is_trained_on():
    spec = importlib.util.spec_from_file_location("language_model", SCRIPT)
    language_model = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(language_model)
    training, validation = language_model.read_documents(limit=None)
    held_out = {paragraph for document in validation for paragraph in document}
    assert held_out.isdisjoint(paragraph for document in training for paragraph in document)
    assert sum(map(len, held_out)) > 20_000
