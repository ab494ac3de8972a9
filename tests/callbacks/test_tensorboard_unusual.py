"""TensorBoard in unusual runs: interrupted, resumed, evaluated inside `fit`, with missing packages or other models."""

import subprocess
import sys
import warnings

import keras
import numpy as np
import pytest
from tensorboard.plugins.custom_scalar import layout_pb2

import keras_xent as kx
from tests.backend import environment
from tests.callbacks.logs import events, of_plugin, scalars
from tests.callbacks.training import BATCH, CLASSES, LENGTH, STEPS, Evaluating, data, fit, model
from tests.tiers import fast_for, whole


@pytest.mark.whole
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_run_leaves_complete_files(tmp_path, error):
    class Interrupt(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            if batch == 3:
                raise error

    built, callback = model(), kx.callbacks.TensorBoard(tmp_path, update_freq=1)
    with pytest.raises(error):
        fit(built, callback, Interrupt())
    # The files are read while the writers are still open.
    assert list(scalars(tmp_path / "train")["units/nll"]) == [1, 2, 3]
    fit(built, callback)
    read = scalars(tmp_path / "train")
    assert list(read["units/nll"]) == [1, 2, 3, *range(4, 4 + 2 * STEPS)]
    assert list(read["epoch_perplexity"]) == [0, 1]


RESUMED = """
import sys
import keras, keras_xent as kx
from tests.callbacks.training import fit
fit(keras.models.load_model(sys.argv[1]), kx.callbacks.TensorBoard(sys.argv[2], update_freq=1), epochs=2)
"""


@pytest.mark.whole
def test_a_resume_in_a_new_process_is_one_curve(tmp_path):
    built = model()
    fit(built, kx.callbacks.TensorBoard(tmp_path / "two", update_freq=1), epochs=3)
    built.save(tmp_path / "model.keras")
    command = [sys.executable, "-c", RESUMED, str(tmp_path / "model.keras"), str(tmp_path / "two")]
    subprocess.run(command, env=environment(), check=True, capture_output=True)
    fit(model(), kx.callbacks.TensorBoard(tmp_path / "one", update_freq=1), epochs=5)
    for name in ("train", "validation"):
        two, one = scalars(tmp_path / "two" / name), scalars(tmp_path / "one" / name)
        assert two.keys() == one.keys()
        for tag in two.keys() - {"tokens/per_second"}:
            assert list(two[tag]) == list(one[tag]), tag
            np.testing.assert_allclose(list(two[tag].values()), list(one[tag].values()), rtol=1e-4, atol=1e-6)


def test_an_evaluation_inside_fit_changes_nothing(tmp_path):
    """The metrics then hold other tokens when the epoch ends: what Keras has reported counts."""
    logger = kx.callbacks.PerplexityLogger()
    callback = kx.callbacks.TensorBoard(tmp_path)
    history = fit(model(), Evaluating(), callback, logger, validation=False)
    read = scalars(tmp_path / "train")
    np.testing.assert_allclose(list(read["epoch_perplexity"].values()), history["perplexity"], rtol=1e-6)
    np.testing.assert_allclose(list(read["units/nll"].values()), np.log(history["perplexity"]), rtol=1e-6)
    np.testing.assert_allclose([row["perplexity"] for row in logger.rows], history["perplexity"], rtol=1e-6)


@fast_for("epoch")
@pytest.mark.parametrize("update_freq", [1, "epoch"])
def test_an_evaluation_inside_fit_has_its_own_run(tmp_path, update_freq):
    callback = kx.callbacks.TensorBoard(tmp_path, update_freq=update_freq)
    history = fit(model(), Evaluating(callback), callback)
    validation = scalars(tmp_path / "validation")
    np.testing.assert_allclose(list(validation["epoch_perplexity"].values()), history["val_perplexity"], rtol=1e-6)
    assert len(scalars(tmp_path / "evaluation")["evaluation_perplexity_vs_iterations"]) == 2


def test_loops_by_hand_are_logged_as_by_keras(tmp_path):
    """`train_on_batch` resets the metrics, so that each reading is that of one batch."""
    built, (x, y) = model(), data()
    callback = kx.callbacks.TensorBoard(tmp_path, update_freq=1)
    callbacks = keras.callbacks.CallbackList([callback], model=built, epochs=1, steps=3)
    callbacks.on_train_begin()
    callbacks.on_epoch_begin(0)
    reported = []
    for batch in range(3):
        callbacks.on_train_batch_begin(batch)
        rows = slice(batch * BATCH, (batch + 1) * BATCH)
        reported.append(built.train_on_batch(x[rows], y[rows], return_dict=True))
        callbacks.on_train_batch_end(batch, reported[-1])
    callbacks.on_epoch_end(0, reported[-1])
    callbacks.on_train_end()
    read = scalars(tmp_path / "train")["batch_perplexity"]
    np.testing.assert_allclose(list(read.values()), [logs["perplexity"] for logs in reported], rtol=1e-6)
    assert list(read) == [1, 2, 3]


def test_an_epoch_can_be_written_without_a_training(tmp_path):
    callback = kx.callbacks.TensorBoard(tmp_path)
    callback.set_model(model())
    callback.on_epoch_end(0, {"loss": 1.0, "val_perplexity": 2.0})
    assert scalars(tmp_path / "train")["epoch_loss"] == {0: 1.0}


@whole
def test_a_probe_that_cannot_be_drawn_is_left_out_and_told(tmp_path):
    x, y = data()
    inputs = keras.Input((LENGTH,))
    hidden = keras.layers.Embedding(CLASSES, 8)(inputs)
    built = keras.Model(inputs, {name: keras.layers.Dense(CLASSES)(hidden) for name in "ab"})
    losses = {name: kx.losses.MaskedSequenceCrossentropy() for name in "ab"}
    built.compile("adam", losses, metrics={"a": [kx.metrics.Perplexity()]})
    callback = kx.callbacks.TensorBoard(tmp_path, probe=(x, y))
    with pytest.warns(UserWarning) as warned:
        built.fit(x, {"a": y, "b": y}, epochs=2, verbose=0, callbacks=[callback])
    assert [str(w.message) for w in warned if "probe" in str(w.message)] == [
        "The probe is left out: `probe` is for models with one output. This one returns a dict."
    ]


def test_a_classifier_gets_a_page_of_its_metrics_and_no_warning(tmp_path):
    rng = np.random.default_rng(0)
    built = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    loss = kx.losses.SparseCategoricalCrossentropy(from_logits=True)
    built.compile("sgd", loss, metrics=[keras.metrics.SparseCategoricalAccuracy(name="accuracy")])
    x, y = rng.normal(size=(12, 4)), rng.integers(0, 3, 12)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        callback = kx.callbacks.TensorBoard(tmp_path, update_freq=1)
        history = built.fit(x, y, 4, 2, verbose=0, validation_data=(x, y), callbacks=[callback]).history
    train = scalars(tmp_path / "train")
    batches = {"batch_loss", "batch_accuracy", "optimizer/learning_rate"}
    assert train.keys() == {"epoch_loss", "epoch_accuracy", "epoch_learning_rate"} | batches
    np.testing.assert_allclose(list(train["epoch_accuracy"].values()), history["accuracy"], rtol=1e-6)
    # Batches of one size: the mean of theirs is that of the epoch.
    np.testing.assert_allclose(np.mean(list(train["batch_accuracy"].values())[:3]), history["accuracy"][0], rtol=1e-6)
    content = events(tmp_path).Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    first = layout_pb2.Layout.FromString(content).category[0]
    assert [chart.margin.series[0].value for chart in first.chart] == ["epoch_accuracy", "epoch_loss"]
    assert scalars(tmp_path).keys() == {"final/loss", "final/val_loss"}


def test_groups_are_one_chart(tmp_path):
    groups = {"groups": ["low", "high"], "group_of": lambda labels: labels > 5}
    fit(model([kx.metrics.Perplexity(ignore_class=0, **groups)]), kx.callbacks.TensorBoard(tmp_path), epochs=1)
    tags = ["epoch_perplexity/low", "epoch_perplexity/high"]
    for name in ("train", "validation"):
        assert {"epoch_perplexity", *tags} <= scalars(tmp_path / name).keys()
    content = events(tmp_path).Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    charts = layout_pb2.Layout.FromString(content).category[0].chart
    found = [[one.value for one in chart.margin.series] for chart in charts]
    assert sorted(map(len, found)) == [1, 1, 1, 2]
    assert tags in found


@whole
def test_another_name_is_as_good(tmp_path):
    fit(model([kx.metrics.Perplexity(ignore_class=0, name="ppl")]), kx.callbacks.TensorBoard(tmp_path), epochs=1)
    assert {"epoch_ppl", "units/ppl_nll", "tokens/ppl_valid"} <= scalars(tmp_path / "train").keys()


@whole
def test_a_perplexity_of_another_package_gets_its_units(tmp_path):
    class Foreign(keras.metrics.Mean):
        def update_state(self, y_true, y_pred, sample_weight=None):
            return super().update_state(8.0)

    fit(model([Foreign(name="perplexity")]), kx.callbacks.TensorBoard(tmp_path), epochs=1)
    read = scalars(tmp_path / "train")
    assert read["epoch_perplexity"] == {0: pytest.approx(8.0)}
    assert read["units/nll"] == {STEPS: pytest.approx(3 * np.log(2))}


def test_all_arguments_of_keras_are_taken(tmp_path):
    callback = kx.callbacks.TensorBoard(
        tmp_path, histogram_freq=1, write_images=True, update_freq=2, write_steps_per_second=True, embeddings_freq=1
    )
    assert isinstance(callback, keras.callbacks.TensorBoard)
    fit(model(), callback, epochs=1)
    assert {"batch_steps_per_second", "epoch_steps_per_second"} <= scalars(tmp_path / "train").keys()
    assert of_plugin(tmp_path / "train", "histograms")
    assert "keras" in events(tmp_path / "train").Tags()["tensors"]


@pytest.mark.parametrize("missing", ["tensorboard", "tensorflow", "matplotlib"])
def test_a_missing_package_is_named(monkeypatch, missing):
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else found(name))
    why = {"tensorboard": "to read it", "tensorflow": "which writes its files", "matplotlib": "which draws the probe"}
    with pytest.raises(ImportError) as error:
        kx.callbacks.TensorBoard(probe=data())
    assert str(error.value) == f"The logs of TensorBoard need {missing}, {why[missing]}. Run: pip install {missing}"


def test_a_probe_that_is_no_batch_is_refused():
    with pytest.raises(ValueError) as error:
        kx.callbacks.TensorBoard(probe=(data()[0], data()[1][0]))
    assert str(error.value) == (
        "`probe` must be a batch (x, y) or (x, y, sample_weight) with labels y of shape [sequences, length]. "
        "Received: labels of shape (6,)."
    )
