"""Perplexity in the progress bar, in a file and as a picture."""

import csv
import importlib.util
import json
import os
import subprocess
import sys

import keras
import numpy as np
import pytest

import keras_xent as kx
from tests.backend import environment
from tests.callbacks.logs import scalars
from tests.callbacks.training import CLASSES, LENGTH, STEPS, Evaluating, data, fit, model
from tests.tiers import fast_for, whole


def rows(path):
    with open(path, newline="") as file:
        if path.suffix == ".jsonl":
            return list(map(json.loads, file))
        return [{k: v if k == "kind" else float(v) for k, v in row.items() if v != ""} for row in csv.DictReader(file)]


@fast_for("csv")
@pytest.mark.parametrize("end", ["csv", "jsonl"])
def test_the_file_holds_epochs_and_batches(tmp_path, end):
    path, (_, y) = tmp_path / f"log.{end}", data()
    history = fit(model(), kx.callbacks.PerplexityLogger(path, update_freq=3))
    read = rows(path)
    assert [row["kind"] for row in read] == ["batches", "batches", "epoch"] * 2
    assert [(row["epoch"], row["step"]) for row in read] == [(0, 3), (0, 4), (0, 4), (1, 6), (1, 8), (1, 8)]
    for prefix, labels in (("", y), ("val_", y[:5])):
        epochs = [row for row in read if row["kind"] == "epoch"]
        perplexities = [row[f"{prefix}perplexity"] for row in epochs]
        np.testing.assert_allclose(perplexities, history[f"{prefix}perplexity"], rtol=1e-6)
        np.testing.assert_allclose([row[f"{prefix}nll"] for row in epochs], np.log(perplexities))
        np.testing.assert_allclose([row[f"{prefix}bits_per_token"] for row in epochs], np.log2(perplexities))
        assert {row[f"{prefix}tokens"] for row in epochs} == {(labels != 0).sum()}
    first, second, epoch = read[:3]
    assert first["tokens"] + second["tokens"] == epoch["tokens"]
    np.testing.assert_allclose(
        (first["nll"] * first["tokens"] + second["nll"] * second["tokens"]) / epoch["tokens"], epoch["nll"], rtol=1e-6
    )
    seconds = [row["seconds"] for row in read]
    assert seconds == sorted(seconds)


@whole
def test_an_evaluation_inside_fit_with_the_logger_changes_nothing():
    logger = kx.callbacks.PerplexityLogger(update_freq=3)
    history = fit(model(), Evaluating(logger), logger)
    epochs = [row for row in logger.rows if row["kind"] == "epoch"]
    for name in "perplexity", "val_perplexity":
        np.testing.assert_allclose([row[name] for row in epochs], history[name], rtol=1e-6)
    assert [row["step"] for row in logger.rows] == [3, 4, 4, 6, 8, 8]


def test_the_progress_bar_and_the_history_have_bits(capsys):
    history = fit(model(), kx.callbacks.PerplexityLogger(), epochs=1, verbose=1)
    assert "bits_per_token: " in capsys.readouterr().out.split("val_")[0]
    for prefix in ("", "val_"):
        np.testing.assert_allclose(history[f"{prefix}bits_per_token"], np.log2(history[f"{prefix}perplexity"]))


RESUMED = """
import sys
import keras, keras_xent as kx
from tests.callbacks.training import fit
fit(keras.models.load_model(sys.argv[1]), kx.callbacks.PerplexityLogger(sys.argv[2]), epochs=1)
"""


@pytest.mark.whole
def test_a_second_fit_and_a_new_process_continue(tmp_path):
    path, built = tmp_path / "log.csv", model()
    logger = kx.callbacks.PerplexityLogger(path)
    fit(built, logger, epochs=1)
    fit(built, logger, epochs=1)
    built.save(tmp_path / "model.keras")
    # An epoch after the checkpoint: it will be trained again.
    fit(built, logger, epochs=1)
    before = rows(path)
    subprocess.run([sys.executable, "-c", RESUMED, tmp_path / "model.keras", path], env=environment(), check=True)
    read = rows(path)
    assert [(row["epoch"], row["step"]) for row in read] == [(epoch, STEPS * (epoch + 1)) for epoch in range(3)]
    assert read[:2] == before[:2]
    np.testing.assert_allclose(read[2]["perplexity"], before[2]["perplexity"], rtol=1e-4)


@pytest.mark.whole
def test_the_file_of_another_training_is_kept(tmp_path):
    path = tmp_path / "log.jsonl"
    for _ in range(3):
        fit(model(), kx.callbacks.PerplexityLogger(path), epochs=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log.1.jsonl", "log.2.jsonl", "log.jsonl"]
    assert len(rows(path)) == len(rows(tmp_path / "log.1.jsonl")) == 1


@pytest.mark.whole
@pytest.mark.parametrize("end", ["csv", "jsonl"])
def test_half_a_row_is_left_out_and_a_foreign_file_is_kept(tmp_path, end):
    path, built = tmp_path / f"log.{end}", model()
    fit(built, kx.callbacks.PerplexityLogger(path), epochs=2)
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    fit(built, kx.callbacks.PerplexityLogger(path), epochs=1)
    assert [row["epoch"] for row in rows(path)] == [0, 1]
    assert rows(path)[1]["step"] == 3 * STEPS
    path.write_text("epoch,loss\n0,NA\n")
    fit(built, kx.callbacks.PerplexityLogger(path), epochs=1)
    assert (tmp_path / f"log.1.{end}").read_text() == "epoch,loss\n0,NA\n"
    assert len(rows(path)) == 1


@pytest.mark.whole
def test_folders_are_made_and_a_run_without_rows_leaves_nothing_behind(tmp_path):
    path = tmp_path / "new" / "log.csv"
    for epochs in (0, 1, 1):
        logger = kx.callbacks.PerplexityLogger(path, picture=tmp_path / "pictures" / "curve.png")
        fit(model(), logger, epochs=epochs)
    assert sorted(p.name for p in path.parent.iterdir()) == ["log.1.csv", "log.csv"]
    assert (tmp_path / "pictures" / "curve.png").exists()


def test_a_picture_that_cannot_be_written_does_not_lose_the_history(tmp_path):
    (tmp_path / "file").touch()
    logger = kx.callbacks.PerplexityLogger(picture=tmp_path / "file" / "curve.png")
    with pytest.warns(UserWarning) as warned:
        assert fit(model(), logger, epochs=1)["perplexity"]
    assert [str(w.message) for w in warned if "picture" in str(w.message)] == [
        f"The picture '{tmp_path / 'file' / 'curve.png'}' cannot be written: {os.strerror(17)}."
    ]


@fast_for("KeyboardInterrupt")
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_run_loses_no_row(tmp_path, error):
    class Interrupt(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            if batch == 2:
                raise error

    logger = kx.callbacks.PerplexityLogger(tmp_path / "log.csv", update_freq=1)
    with pytest.raises(error):
        fit(model(), logger, Interrupt())
    assert [row["step"] for row in rows(tmp_path / "log.csv")] == [1, 2]
    logger.draw(tmp_path / "so_far.png")
    assert (tmp_path / "so_far.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_is_drawn_at_the_end(tmp_path):
    fit(model(), kx.callbacks.PerplexityLogger(picture=tmp_path / "curve.svg", update_freq=1))
    picture = (tmp_path / "curve.svg").read_text()
    # Text is drawn as paths, each named by a comment.
    for text in ("perplexity", "bits per token", "step", "train, batches", "validation"):
        assert f"<!-- {text} -->" in picture


@pytest.mark.whole
def test_infinite_perplexity_is_written_as_such(tmp_path):
    for end in ("csv", "jsonl"):
        built = model(rate=0.0)
        built.layers[-1].kernel.assign(1e6 * built.layers[-1].kernel)
        fit(built, kx.callbacks.PerplexityLogger(tmp_path / f"log.{end}"), epochs=1)
        (row,) = rows(tmp_path / f"log.{end}")
        assert float(row["perplexity"]) == np.inf
        assert 1e3 < row["nll"] < np.inf


def test_without_a_perplexity_it_says_once_what_is_missing(tmp_path):
    with pytest.warns(UserWarning) as warned:
        fit(model(metrics=[]), kx.callbacks.PerplexityLogger(tmp_path / "log.csv"))
    assert [str(w.message) for w in warned if "perplexity" in str(w.message)] == [
        "No perplexity will be logged, since the model has no metric of it. Compile it with "
        "metrics=[keras_xent.metrics.Perplexity()]."
    ]


def test_arguments_are_checked(monkeypatch):
    with pytest.raises(ValueError) as error:
        kx.callbacks.PerplexityLogger("log.txt")
    assert str(error.value) == "`path` must be None or a file that ends in .csv or .jsonl. Received: path='log.txt'."
    with pytest.raises(ValueError) as error:
        kx.callbacks.PerplexityLogger(picture="curve.xyz")
    assert str(error.value) == (
        "`picture` must be None or a file that ends in .png, .svg, .pdf, .jpg. Received: 'curve.xyz'."
    )
    with pytest.raises(ValueError) as error:
        kx.callbacks.PerplexityLogger(update_freq=0)
    assert str(error.value) == "`update_freq` must be a whole number of at least 1. Received: update_freq=0."
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError) as error:
        kx.callbacks.PerplexityLogger(picture="curve.png")
    assert str(error.value) == "`picture` needs matplotlib, which draws it. Run: pip install matplotlib"


def scaled_model():
    """Its loss scale is so high that the first updates are skipped."""
    keras.utils.set_random_seed(0)
    built = keras.Sequential(
        [keras.Input((LENGTH,)), keras.layers.Embedding(CLASSES, 8), kx.layers.LogitsDense(CLASSES)]
    )
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1), initial_scale=2.0**22)
    loss = kx.losses.MaskedSequenceCrossentropy(ignore_class=0)
    built.compile(optimizer, loss, metrics=[kx.metrics.Perplexity(ignore_class=0)])
    return built


@pytest.mark.whole
def test_batches_whose_update_is_skipped_are_counted_and_a_backup_continues(tmp_path):
    class Interrupt(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                raise RuntimeError

    def callbacks():
        return [
            keras.callbacks.BackupAndRestore(str(tmp_path / "backup")),
            kx.callbacks.PerplexityLogger(tmp_path / "log.csv", update_freq=1),
            kx.callbacks.TensorBoard(tmp_path / "logs", update_freq=1),
        ]

    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_float16")
    try:
        with pytest.raises(RuntimeError):
            fit(scaled_model(), *callbacks(), Interrupt(), epochs=4)
        # As in a new process.
        built = scaled_model()
        fit(built, *callbacks(), epochs=4)
    finally:
        keras.config.set_dtype_policy(before)
    steps = list(range(1, 4 * STEPS + 1))
    assert int(built.optimizer.iterations) < steps[-1]
    read = rows(tmp_path / "log.csv")
    assert [row["step"] for row in read if row["kind"] == "batches"] == steps
    epochs = [(row["epoch"], row["step"]) for row in read if row["kind"] == "epoch"]
    assert epochs == [(epoch, STEPS * (epoch + 1)) for epoch in range(4)]
    curves = scalars(tmp_path / "logs" / "train")
    assert list(curves["batch_perplexity"]) == steps
    assert list(curves["epoch_perplexity"]) == [0, 1, 2, 3]
