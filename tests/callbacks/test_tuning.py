"""Callbacks beside the tools that search for settings: copies, tables of runs, a search of KerasTuner."""

import copy
import pickle

import keras
import keras_tuner
import numpy as np
import pytest
from tensorboard.plugins.hparams import api as hparams_api

import keras_xent as kx
from tests.callbacks.hparams_tables import table
from tests.callbacks.logs import scalars
from tests.callbacks.training import STEPS, data, fit, model

TEXTS = [f"token{i}" for i in range(11)]


def batch():
    x, y = data()
    return x[:2], y[:2]


@pytest.fixture
def callbacks(tmp_path):
    return [
        kx.callbacks.TensorBoard(
            tmp_path / "logs", update_freq=2, gradient_norm=True, probe=batch(), decode=TEXTS, hparams={"a": 1}
        ),
        kx.callbacks.PerplexityLogger(tmp_path / "log.csv", picture=tmp_path / "curve.png", update_freq=2),
        kx.callbacks.ValidateEvery(3, batch(), callbacks=[keras.callbacks.EarlyStopping()]),
    ]


def copies(callbacks):
    return [copy.deepcopy(callbacks), pickle.loads(pickle.dumps(callbacks))]


@pytest.mark.whole
def test_callbacks_can_be_copied_and_pickled_before_and_after_a_training(tmp_path, callbacks):
    for twin in copies(callbacks):
        assert [type(one) for one in twin] == [type(one) for one in callbacks]
    callbacks[0].probe_freq = 2
    fit(model(), *callbacks)
    for i, twin in enumerate(copies(callbacks)):
        tensorboard, logger, validates = twin
        assert (tensorboard.update_freq, tensorboard.gradient_norm, tensorboard.probe_freq) == (2, True, 2)
        np.testing.assert_array_equal(tensorboard.probe.y, batch()[1])
        assert logger.rows == callbacks[1].rows
        assert validates.history == callbacks[2].history
        # A copy trains another model from its beginning.
        tensorboard.log_dir, logger.path = str(tmp_path / f"logs{i}"), str(tmp_path / f"{i}.csv")
        logger.rows = []
        fit(model(), *twin, epochs=1)
        assert list(scalars(tmp_path / f"logs{i}" / "train")["units/nll"]) == [2, 4]
        assert [row["step"] for row in logger.rows] == [2, 3, 4, 4]


class Wrapped(keras.losses.Loss):
    """Its configuration holds a loss."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    def call(self, y_true, y_pred):
        return self.base(y_true, y_pred)

    def get_config(self):
        return {"base": self.base}


class Unreadable:
    def __repr__(self):
        raise RuntimeError


class NoConfig(keras.layers.Layer):
    def get_config(self):
        raise NotImplementedError


@pytest.mark.whole
def test_anything_is_written_into_the_table_of_runs(tmp_path):
    settings = {
        "dtype": np.dtype("float32"),
        "policy": keras.dtype_policies.DTypePolicy("mixed_bfloat16"),
        "layer": keras.layers.Dense(3),
        "metric": keras.metrics.Mean(),
        "no config": NoConfig(),
        "function": np.mean,
        "class": keras.layers.Dense,
        "path": tmp_path,
        "array": np.arange(3),
        "number": np.float32(0.5),
        "tensor": keras.ops.ones(()),
        "huge": 10**400,
        "digits": 10**5000,
        "infinite": float("inf"),
        "text": "\udc80\x00" + "x" * 500,
        "unreadable": Unreadable(),
        "nested": {"rate": 0.1, "layers": [keras.layers.ReLU(), keras.layers.Dense(2)], 3: {"deep": True}},
        "nothing": None,
        7: "a number as key",
        hparams_api.HParam("named"): 2,
        (1, 2): "a tuple as key",
    }
    built = model(loss=Wrapped(kx.losses.MaskedSequenceCrossentropy(ignore_class=0)))
    fit(built, kx.callbacks.TensorBoard(tmp_path / "run", hparams=settings), epochs=1)
    _, ((read, _),) = table(tmp_path)
    assert read["loss"] == "Wrapped" and read["loss/base"] == "MaskedSequenceCrossentropy"
    assert (read["number"], read["tensor"], read["named"]) == (0.5, 1.0, 2.0)
    assert (read["nested/rate"], read["nested/3/deep"], read["nested/layers/1/units"]) == (0.1, True, 2.0)
    assert (read["dtype"], read["layer"], read["layer/units"], read["metric"]) == ("float32", "Dense", 3.0, "Mean")
    assert (read["function"], read["class"], read["7"], read["(1, 2)"]) == (
        "mean",
        "Dense",
        *list(settings.values())[-3::2],
    )
    assert read["infinite"] == "inf" and read["array"] == "[0, 1, 2]" and read["unreadable"] == "Unreadable"
    assert "nothing" not in read


def test_settings_that_are_no_dict_are_refused():
    with pytest.raises(ValueError) as error:
        kx.callbacks.TensorBoard("logs", hparams=["lr"])
    assert str(error.value) == (
        "`hparams` must be None, a dict of settings, or the HyperParameters of KerasTuner. Received: a list."
    )


@pytest.mark.whole
def test_the_settings_of_another_callback_in_the_same_folder_stay(tmp_path):
    """`hparams.api` writes the columns of an experiment, and in each run their values."""
    import tensorflow as tf

    rate = hparams_api.HParam("rate", hparams_api.RealInterval(0.0, 1.0))
    with tf.summary.create_file_writer(str(tmp_path)).as_default():
        hparams_api.hparams_config([rate], [hparams_api.Metric("epoch_perplexity", group="validation")])
    results = {}
    for value in (0.01, 0.1):
        folder = tmp_path / str(value)
        others = hparams_api.KerasCallback(str(folder), {rate: value})
        history = fit(model(rate=value), kx.callbacks.TensorBoard(folder), others, epochs=1)
        results[value] = {("validation", "epoch_perplexity"): pytest.approx(history["val_perplexity"][-1], rel=1e-6)}
    columns, rows = table(tmp_path)
    assert columns == {"rate"}
    assert {settings.pop("rate"): metrics for settings, metrics in rows} == results
    assert all(settings == {} for settings, _ in rows)


@pytest.mark.whole
def test_a_search_of_keras_tuner(tmp_path):
    def build(hp):
        return model(rate=hp.Choice("rate", [0.01, 0.1]))

    tuner = keras_tuner.GridSearch(
        build, keras_tuner.Objective("val_perplexity", "min"), directory=tmp_path / "search", project_name="p"
    )
    x, y = data()
    callbacks = [
        kx.callbacks.TensorBoard(tmp_path / "logs", update_freq=2, gradient_norm=True, probe=batch(), decode=TEXTS),
        kx.callbacks.PerplexityLogger(),
        kx.callbacks.ValidateEvery(3, batch()),
    ]
    options = {"batch_size": 4, "validation_data": (x[:5], y[:5]), "verbose": 0, "callbacks": callbacks}
    tuner.search(x, y, epochs=2, **options)
    assert tuner.get_best_hyperparameters()[0].values == {"rate": 0.1}
    if keras.backend.backend() == "tensorflow":
        # On other backends KerasTuner gives all trials one folder, and writes no settings.
        columns, rows = table(tmp_path / "logs")
        assert {"rate"} <= columns
        assert sorted(settings["rate"] for settings, _ in rows) == [0.01, 0.1]
        paths = list((tmp_path / "logs").glob("*/execution0/train"))
        assert len(paths) == 2
        for path in paths:
            assert list(scalars(path)["units/nll"]) == list(range(2, 2 * STEPS + 1, 2))
