"""What TensorBoard reads back is what the run has counted."""

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request

import keras
import numpy as np
import pytest
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2

import keras_xent as kx
from keras_xent.callbacks._scalars import marks_in_events
from keras_xent.callbacks._timeline import Mark
from tests import oracles
from tests.backend import environment, to_numpy
from tests.callbacks.logs import events, of_plugin, scalars
from tests.callbacks.training import BATCH, CLASSES, LENGTH, STEPS, data, fit, model
from tests.tiers import fast_for, whole

TEXTS = ["[PAD]", "a|b", "<b>", "\n", *(f"token{i}" for i in range(4, CLASSES))]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One run with everything: two calls of `fit` with two epochs each, then `evaluate`."""
    folder = tmp_path_factory.mktemp("logs") / "first"
    x, y = data()
    built = model([kx.metrics.Perplexity(ignore_class=0), kx.metrics.TokenAccuracy(ignore_class=0)])
    callback = kx.callbacks.TensorBoard(
        folder, update_freq="batch", gradient_norm=True, probe=(x[-3:], y[-3:]), decode=TEXTS, hparams={"note": "hello"}
    )
    histories = [fit(built, callback), fit(built, callback)]
    evaluated = built.evaluate(x, y, batch_size=BATCH, verbose=0, return_dict=True, callbacks=[callback])
    return folder, built, [{k: v for k, v in history.items()} for history in histories], evaluated


def joined(histories, name):
    return [value for history in histories for value in history[name]]


def test_epochs_of_train_and_validation_are_under_the_same_tags(run):
    folder, _, histories, _ = run
    for name, prefix in (("train", ""), ("validation", "val_")):
        read, tokens = scalars(folder / name), (data()[1][: None if name == "train" else 5] != 0).sum()
        perplexities = joined(histories, f"{prefix}perplexity")
        assert list(read["epoch_perplexity"]) == [0, 1, 2, 3]
        np.testing.assert_allclose(list(read["epoch_perplexity"].values()), perplexities, rtol=1e-6)
        assert read["tokens/valid"] == {STEPS * (epoch + 1): tokens for epoch in range(4)}
        np.testing.assert_allclose(list(read["epoch_loss"].values()), joined(histories, f"{prefix}loss"), rtol=1e-6)


def test_nats_of_train_and_validation_and_their_gap_are_at_the_same_steps(run):
    train, validation = (scalars(run[0] / name) for name in ("train", "validation"))
    steps = [STEPS * (epoch + 1) for epoch in range(4)]
    assert list(validation["units/nll"]) == list(validation["gap/nll"]) == steps
    assert list(train["units/nll"]) == list(range(1, 4 * STEPS + 1))
    nll, val_nll = (np.log(joined(run[2], name)) for name in ("perplexity", "val_perplexity"))
    np.testing.assert_allclose(list(validation["units/nll"].values()), val_nll, rtol=1e-6)
    np.testing.assert_allclose(list(validation["gap/nll"].values()), val_nll - nll, atol=1e-6)


def test_the_default_page_has_keras_tags_and_few_groups_and_no_curve_twice(run):
    names = ("loss", "perplexity", "token_accuracy")
    keras_tags = {f"{kind}_{name}" for kind in ("epoch", "batch") for name in names} | {"epoch_learning_rate"}
    groups = {
        "train": {"tokens/per_second", "tokens/valid_share", "tokens/valid", "units/nll"}
        | {"optimizer/learning_rate", "optimizer/gradient_norm"},
        "validation": {"tokens/valid", "units/nll", "gap/nll"},
    }
    evaluated = {f"evaluation_{name}_vs_iterations" for name in names}
    assert scalars(run[0] / "train").keys() == keras_tags | groups["train"]
    assert scalars(run[0] / "validation").keys() == {f"epoch_{n}" for n in names} | evaluated | groups["validation"]
    assert scalars(run[0] / "evaluation").keys() == evaluated
    assert scalars(run[0]).keys() == {"final/perplexity", "final/val_perplexity"}


@fast_for("epoch")
@pytest.mark.parametrize("update_freq", ["epoch", 2])
def test_without_batches_an_epoch_has_the_nats_and_the_tokens(tmp_path, update_freq):
    history = fit(model(), kx.callbacks.TensorBoard(tmp_path, update_freq=update_freq), validation=False)
    read = scalars(tmp_path / "train")
    steps = [STEPS, 2 * STEPS] if update_freq == "epoch" else [2, 4, 6, 8]
    for tag in ("units/nll", "tokens/valid_share", "tokens/per_second"):
        assert list(read[tag]) == steps
    if update_freq == "epoch":
        np.testing.assert_allclose(list(read["units/nll"].values()), np.log(history["perplexity"]), rtol=1e-6)
        np.testing.assert_allclose(list(read["tokens/valid_share"].values()), (data()[1] != 0).mean(), rtol=1e-6)


def test_steps_go_on_over_two_fits(run):
    train = scalars(run[0] / "train")
    assert list(train["batch_perplexity"]) == list(range(1, 4 * STEPS + 1))
    marks = [mark for mark in marks_in_events(str(run[0] / "train")) if mark.epoch is not None]
    assert marks == [Mark(STEPS * (epoch + 1), STEPS * (epoch + 1), epoch) for epoch in range(4)]


def test_evaluate_writes_into_a_run_of_its_own(run):
    folder, _, _, evaluated = run
    read = scalars(folder / "evaluation")
    assert read["evaluation_perplexity_vs_iterations"] == {4 * STEPS: pytest.approx(evaluated["perplexity"], rel=1e-6)}
    assert len(scalars(folder / "validation")["evaluation_perplexity_vs_iterations"]) == 4


def test_evaluate_alone_makes_no_other_run(tmp_path):
    x, y = data()
    callback = kx.callbacks.TensorBoard(tmp_path, update_freq=1)
    model().evaluate(x, y, verbose=0, callbacks=[callback])
    assert os.listdir(tmp_path) == ["evaluation"]


def test_batch_values_are_of_the_batch_alone(tmp_path):
    """With a learning rate of 0 every batch has the values that the model gives it afterwards."""
    built = model([kx.metrics.Perplexity(ignore_class=0), kx.metrics.TokenAccuracy(ignore_class=0)], rate=0.0)
    fit(built, kx.callbacks.TensorBoard(tmp_path, update_freq=1), epochs=2)
    read, (x, y) = scalars(tmp_path / "train"), data()
    for step in range(2 * STEPS):
        batch = slice(step % STEPS * BATCH, (step % STEPS + 1) * BATCH)
        logits = to_numpy(built(x[batch]))
        nll = oracles.sparse(y[batch].ravel(), logits.reshape(-1, CLASSES))[0][y[batch].ravel() != 0]
        hits = (logits.argmax(-1) == y[batch])[y[batch] != 0]
        loss = float(built.loss(y[batch], built(x[batch])))
        for tag, value in {
            "units/nll": nll.mean(),
            "batch_perplexity": np.exp(nll.mean()),
            "tokens/valid_share": (y[batch] != 0).mean(),
            "batch_token_accuracy": hits.mean(),
            "batch_loss": loss,
            "optimizer/learning_rate": 0.0,
        }.items():
            np.testing.assert_allclose(read[tag][step + 1], value, rtol=1e-6, err_msg=tag)
        assert read["tokens/per_second"][step + 1] > 0


@pytest.mark.whole
@pytest.mark.parametrize("options", [{}, {"steps_per_execution": 3}], ids=["", "three steps at once"])
def test_between_two_writings_the_batches_are_taken_together(tmp_path, options):
    fit(model(rate=0.0, **options), kx.callbacks.TensorBoard(tmp_path / "3", update_freq=3), epochs=2)
    fit(model(rate=0.0), kx.callbacks.TensorBoard(tmp_path / "1", update_freq=1), epochs=2)
    together, each = (scalars(tmp_path / n / "train") for n in ("3", "1"))
    # Three batches and the rest of the epoch; then up to the sixth, and the rest.
    assert list(together["units/nll"]) == ([3, 4, 7, 8] if options else [3, 4, 6, 8])
    tokens = np.array([(y != 0).sum() for y in np.split(data()[1], [4, 8, 12])])
    nll = np.array(list(each["units/nll"].values())[:4])
    first = (nll * tokens)[:3].sum() / tokens[:3].sum()
    np.testing.assert_allclose([together["units/nll"][3], together["units/nll"][4]], [first, nll[3]], rtol=1e-5)


def test_the_gradient_norm_is_that_of_the_step(run, tmp_path):
    built, (x, y) = model(rate=0.0), data()
    before = built.get_weights()
    fit(built, kx.callbacks.TensorBoard(tmp_path, update_freq=1, gradient_norm=True), epochs=1)
    read = list(scalars(tmp_path / "train")["optimizer/gradient_norm"].values())
    # A step of plain descent with rate 1 is the gradient.
    for step in range(STEPS):
        built.set_weights(before)
        built.compile(keras.optimizers.SGD(1.0), built.loss)
        built.train_on_batch(x[step * BATCH : (step + 1) * BATCH], y[step * BATCH : (step + 1) * BATCH])
        gradient = [a - b for a, b in zip(before, built.get_weights(), strict=True)]
        np.testing.assert_allclose(read[step], np.sqrt(sum((g**2).sum() for g in gradient)), rtol=1e-6)
    assert "gradient_norm" not in run[2][0]


@pytest.mark.whole
@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
def test_a_watched_model_trains_saves_and_loads_as_any_other(tmp_path, policy):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        built, plain = model(), model()
        fit(built, kx.callbacks.TensorBoard(tmp_path / "logs", update_freq=1, gradient_norm=True))
        fit(plain)
        built.save(tmp_path / "model.keras")
        loaded = keras.models.load_model(tmp_path / "model.keras")
    finally:
        keras.config.set_dtype_policy(before)
    norms = list(scalars(tmp_path / "logs" / "train")["optimizer/gradient_norm"].values())
    # A scaled loss would have a gradient that is thousands of times as large.
    assert all(0 < norm < 10 for norm in norms)
    for ours, theirs in zip(built.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert len(loaded.optimizer.variables) == len(built.optimizer.variables)
    for ours, theirs in zip(loaded.optimizer.variables, built.optimizer.variables, strict=True):
        np.testing.assert_array_equal(to_numpy(ours.value), to_numpy(theirs.value))
    loaded.save_weights(tmp_path / "plain.weights.h5")
    built.load_weights(tmp_path / "plain.weights.h5")


def test_nothing_is_read_from_the_device_at_steps_that_write_nothing(tmp_path, monkeypatch):
    asked = []
    totals = kx.metrics.Perplexity.totals
    monkeypatch.setattr(kx.metrics.Perplexity, "totals", lambda self: asked.append(1) or totals(self))
    callback = kx.callbacks.TensorBoard(tmp_path, update_freq=1000)
    fit(model(), callback, epochs=3, validation=False)
    # Once for the last batches of an epoch, and once for the epoch.
    assert len(asked) == 6
    # Keras waits for the logs of each batch unless all callbacks say that it need not.
    assert callback.async_safe


def test_the_page_of_charts_finds_its_tags(run):
    folder = run[0]
    content = events(folder).Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    layout = layout_pb2.Layout.FromString(content)
    assert [category.title for category in layout.category] == ["train and validation", "optimization"]
    # Charts of margins are not smoothed.
    series = [chart.margin.series[0] for category in layout.category for chart in category.chart]
    assert all(one.value == one.lower == one.upper for one in series)
    tags = {one.value for one in series}
    assert tags <= scalars(folder / "train").keys() | scalars(folder / "validation").keys()
    assert {"units/nll", "gap/nll", "epoch_loss", "epoch_token_accuracy", "optimizer/gradient_norm"} <= tags


def test_the_table_of_runs_has_the_settings_of_loss_and_optimizer(run):
    read = events(run[0])
    content = read.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    settings = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    assert settings["loss"].string_value == "MaskedSequenceCrossentropy"
    assert settings["loss/label_smoothing"].number_value == pytest.approx(0.1)
    assert settings["loss/ignore_class"].number_value == 0
    assert settings["optimizer"].string_value == "Adam"
    assert settings["optimizer/learning_rate"].number_value == pytest.approx(0.05)
    assert settings["parameters"].number_value == run[1].count_params()
    assert settings["note"].string_value == "hello"
    assert "_hparams_/session_end_info" in read.Tags()["tensors"]
    # One of ours would hide the columns of KerasTuner and of `tensorboard.plugins.hparams.api`.
    assert "_hparams_/experiment" not in read.Tags()["tensors"]


def test_the_probe_shows_its_tokens(run):
    folder, built, _, _ = run
    x, y = (array[-3:] for array in data())
    losses = oracles.sparse(y.ravel(), to_numpy(built(x)).reshape(-1, CLASSES))[0].reshape(y.shape)
    (histogram,) = of_plugin(folder / "probe", "histograms").values()
    # Files of the same second are read by their names, in which 10 is before 9.
    assert sorted(histogram) == [0, 1, 2, 3]
    assert histogram[3][:, 2].sum() == (y != 0).sum()
    np.testing.assert_allclose(
        [histogram[3][0, 0], histogram[3][-1, 1]], [losses[y != 0].min(), losses[y != 0].max()], rtol=1e-6
    )
    (pictures,) = of_plugin(folder / "probe", "images").values()
    # Width and height, and a picture of each sequence.
    assert len(pictures[3]) == 2 + 3
    assert pictures[3][2].startswith(b"\x89PNG")
    (table,) = of_plugin(folder / "probe", "text").values()
    rows = [line.split(" | ") for line in table[3].item().decode().splitlines()[2:]]
    worst = np.sort(losses[y != 0])[::-1][: len(rows)]
    np.testing.assert_allclose([float(row[0].strip("| ")) for row in rows], worst, atol=6e-4)


@whole
def test_outputs_have_tags_of_their_own(tmp_path):
    (x, y), inputs = data(), keras.Input((LENGTH,))
    hidden = keras.layers.Embedding(CLASSES, 8)(inputs)
    built = keras.Model(inputs, {"a": keras.layers.Dense(CLASSES)(hidden), "b": keras.layers.Dense(CLASSES)(hidden)})
    metrics = {name: [kx.metrics.Perplexity(ignore_class=0)] for name in "ab"}
    built.compile("adam", {name: kx.losses.MaskedSequenceCrossentropy() for name in "ab"}, metrics=metrics)
    callback = kx.callbacks.TensorBoard(tmp_path, update_freq=2)
    history = built.fit(x, {"a": y, "b": y}, batch_size=BATCH, verbose=0, callbacks=[callback]).history
    read = scalars(tmp_path / "train")
    for name in "ab":
        assert read[f"epoch_{name}_perplexity"] == {0: pytest.approx(history[f"{name}_perplexity"][0], rel=1e-6)}
        assert list(read[f"units/{name}_nll"]) == [2, 4]


def test_data_of_unknown_length_end_without_an_empty_batch(tmp_path):
    import tensorflow as tf

    batches = tf.data.Dataset.from_tensor_slices(data()).batch(BATCH).filter(lambda x, y: True)
    model().fit(batches, epochs=2, verbose=0, callbacks=[kx.callbacks.TensorBoard(tmp_path, update_freq=3)])
    read = scalars(tmp_path / "train")["units/nll"]
    assert all(np.isfinite(value) for value in read.values())
    assert len(read) == 4


# TensorBoard itself.


@pytest.fixture(scope="module")
def server(run):
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(run[0].parent), "--host=127.0.0.1", "--port=0"]
    process = subprocess.Popen([*command, "--load_fast=false"], stderr=subprocess.PIPE, text=True, env=environment())
    lines = []
    for line in process.stderr:
        lines.append(line)
        if "http://" in line:
            break
    else:
        raise AssertionError("".join(lines))
    address = next(word for word in line.split() if word.startswith("http://")).rstrip("/")
    deadline = time.monotonic() + 60
    runs = {"first", *(f"first/{name}" for name in ("train", "validation", "evaluation", "probe"))}
    while set(get(f"{address}/data/runs")) < runs:
        assert time.monotonic() < deadline
        time.sleep(0.5)
    yield address
    process.kill()


def get(address, body=None):
    request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
    return json.load(urllib.request.urlopen(request, timeout=30))


def test_the_server_shows_what_was_written(run, server):
    tags = get(f"{server}/data/plugin/scalars/tags")
    assert {"epoch_perplexity", "units/nll", "tokens/per_second"} <= tags["first/train"].keys()
    assert {"epoch_perplexity", "gap/nll"} <= tags["first/validation"].keys()
    points = get(f"{server}/data/plugin/scalars/scalars?run=first/validation&tag=epoch_perplexity")
    assert [step for _, step, _ in points] == [0, 1, 2, 3]
    np.testing.assert_allclose([value for *_, value in points], joined(run[2], "val_perplexity"), rtol=1e-6)
    layout = get(f"{server}/data/plugin/custom_scalars/layout")
    assert layout["category"][0]["chart"][-1]["margin"]["series"][0]["value"] == "units/nll"
    experiment = get(f"{server}/data/plugin/hparams/experiment", b"{}")
    assert "loss/label_smoothing" in {one["name"] for one in experiment["hparamInfos"]}
    asked = {
        "colParams": [{"metric": {"tag": "epoch_perplexity", "group": "validation"}}],
        "allowedStatuses": ["STATUS_UNKNOWN", "STATUS_SUCCESS", "STATUS_FAILURE", "STATUS_RUNNING"],
        "startIndex": 0,
        "sliceSize": 9,
    }
    (session,) = get(f"{server}/data/plugin/hparams/session_groups", json.dumps(asked).encode())["sessionGroups"]
    values = {metric["name"]["tag"]: metric["value"] for metric in session["metricValues"]}
    assert values["final/val_perplexity"] == pytest.approx(run[2][-1]["val_perplexity"][-1], rel=1e-6)
    assert values["final/perplexity"] == pytest.approx(run[2][-1]["perplexity"][-1], rel=1e-6)
    for plugin, tag in (("images", "tokens"), ("text", "worst_tokens"), ("histograms", "token_nll")):
        assert tag in get(f"{server}/data/plugin/{plugin}/tags")["first/probe"]


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed to open the page in")
def test_a_browser_shows_the_page_of_charts(server, tmp_path):
    options = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--virtual-time-budget=20000",
        f"--user-data-dir={tmp_path}",
    ]
    page = subprocess.run(
        [CHROMIUM, *options, "--dump-dom", f"{server}/#custom_scalars"], capture_output=True, text=True, timeout=120
    ).stdout
    assert "Custom Scalars" in page
    assert "tf-custom-scalar" in page
