"""Batches whose loss is no number, or jumps."""

import copy
import pickle

import keras
import numpy as np
import pytest

import keras_xent as kx
from tests import oracles
from tests.backend import to_numpy
from tests.callbacks.training import BATCH, CLASSES, STEPS, data, fit, model
from tests.tiers import fast_for


def fitted(built, detector, x, y, **options):
    return built.fit(x, y, BATCH, verbose=0, shuffle=False, callbacks=[detector], **options).history


def test_a_spike_is_reported_with_its_batch_and_its_worst_tokens():
    x, y = (np.tile(array, (4, 1))[: 13 * BATCH] for array in data())
    built, detector = (
        model(rate=0.0),
        kx.callbacks.SpikeDetector(3.0, worst=3, decode=[f"t{i}" for i in range(CLASSES)]),
    )
    # In the last batch each label is the one that the model holds least likely.
    last = slice(12 * BATCH, 13 * BATCH)
    logits = to_numpy(built(x[last]))
    y = y.copy()
    y[last] = np.where(y[last] == 0, 0, 1 + logits[..., 1:].argmin(-1))
    built.layers[-1].bias.assign(0 * built.layers[-1].bias)
    built.layers[0].embeddings.assign(30 * to_numpy(built.layers[0].embeddings.value))
    logits = to_numpy(built(x[last]))
    nll = oracles.sparse(y[last].ravel(), logits.reshape(-1, CLASSES))[0].reshape(y[last].shape)
    nll = np.where(y[last] == 0, -np.inf, nll)
    with pytest.warns(UserWarning) as warned:
        fitted(built, detector, x, y)
    (report,) = detector.reports
    assert (report["kind"], report["epoch"], report["batch"]) == ("spike", 0, 12)
    assert report["loss"] == pytest.approx(nll[y[last] != 0].mean(), rel=1e-6)
    order = np.argsort(-nll, axis=None, kind="stable")[:3]
    tokens = report["worst_tokens"]
    np.testing.assert_allclose([one["nll"] for one in tokens], nll.ravel()[order], rtol=1e-6)
    for one in tokens:
        assert one["label"] == y[last][one["sequence"], one["position"]]
        assert one["context"] == y[last][one["sequence"], : one["position"]].tolist()
    (message,) = [str(w.message) for w in warned if "batch 12" in str(w.message)]
    assert message.startswith(f"The loss of batch 12 of epoch 0 is {report['loss']:.4g}, ")
    worst = tokens[0]
    assert f"{worst['nll']:.3f} nats: 't{worst['label']}' in sequence {worst['sequence']} at" in message


@pytest.mark.whole
def test_training_and_model_are_as_without_it(tmp_path):
    plain, watched = model(), model()
    history = fit(plain)
    detector = kx.callbacks.SpikeDetector()
    assert fit(watched, detector) == history
    assert detector.reports == []
    for before, after in zip(plain.get_weights(), watched.get_weights(), strict=True):
        np.testing.assert_array_equal(before, after)
    watched.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(to_numpy(loaded(data()[0])), to_numpy(watched(data()[0])))
    for copied in (copy.deepcopy(detector), pickle.loads(pickle.dumps(detector))):
        assert copied.threshold == 6.0


@fast_for("non_finite")
@pytest.mark.parametrize("stop", ["never", "non_finite"])
def test_a_loss_that_is_no_number_is_reported_and_stops_training_if_asked_to(stop):
    class Break(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            if batch == 2:
                kernel = self.model.layers[-1].kernel
                kernel.assign(kernel * float("nan"))

    built, detector = model(), kx.callbacks.SpikeDetector(stop=stop, worst=2)
    with pytest.warns(UserWarning, match="The loss of batch 2 of epoch 0 is nan"):
        fit(built, Break(), detector, epochs=1, validation=False)
    assert [report["batch"] for report in detector.reports] == ([2, 3] if stop == "never" else [2])
    assert all(report["kind"] == "non_finite" for report in detector.reports)
    assert all(np.isnan(one["nll"]) for one in detector.reports[0]["worst_tokens"])
    assert STEPS == 4


@pytest.mark.parametrize(
    "loss, label, units",
    [
        ("mse", 1e4, 1),
        (kx.losses.BinaryCrossentropy(from_logits=True), 1.0, 1),
        (kx.losses.BinaryCrossentropy(from_logits=True, ignore_class=float("nan")), 1.0, 3),
    ],
    ids=["mse", "binary", "binary of three"],
)
def test_another_loss_is_watched_by_its_value(loss, label, units):
    x = np.ones((12, 1), "float32")
    y = np.zeros((12, units), "float32")
    y[11] = label
    output = keras.layers.Dense(units, use_bias=False, kernel_initializer=keras.initializers.Constant(-5.0))
    built = keras.Sequential([keras.Input((1,)), output])
    built.compile(keras.optimizers.SGD(0.0), loss)
    detector = kx.callbacks.SpikeDetector()
    with pytest.warns(UserWarning, match="The loss of batch 11 of epoch 0 is"):
        built.fit(x, y, 1, verbose=0, shuffle=False, callbacks=[detector])
    assert [(report["batch"], report["worst_tokens"]) for report in detector.reports] == [(11, [])]


class WithoutTraining(keras.Sequential):
    """A model whose loss does not know whether it is one of training."""

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None):
        return super().compute_loss(x, y, y_pred, sample_weight)


def test_a_validation_is_no_part_of_the_next_step():
    x, y = np.ones((12, 1), "float32"), np.zeros((12, 1), "float32")
    output = keras.layers.Dense(1, use_bias=False, kernel_initializer="ones")
    built = WithoutTraining([keras.Input((1,)), output])
    built.compile(keras.optimizers.SGD(0.0), "mse")
    detector = kx.callbacks.SpikeDetector(window=2)
    fitted(built, detector, x, y, epochs=2, validation_data=(x, y))
    assert detector.reports == []


def test_a_batch_without_a_valid_token_is_no_spike():
    x, y = data()
    y = np.where(np.arange(len(y))[:, None] < BATCH, 0, y)
    detector = kx.callbacks.SpikeDetector(window=1)
    built = model(rate=0.0)
    fitted(built, detector, x[:BATCH], y[:BATCH])
    assert detector.reports == [] and int(to_numpy(detector._watched._counts.value)[0]) == 0


def test_arguments_are_checked():
    for options, message in (
        ({"threshold": 0}, "`threshold` must be a number above 0. Received: threshold=0."),
        ({"threshold": None}, "`threshold` must be a number above 0. Received: threshold=None."),
        ({"window": 0}, "`window` must be a whole number of at least 1. Received: window=0."),
        ({"stop": True}, "`stop` must be one of 'never', 'non_finite', 'always'. Received: stop=True."),
        ({"skip": "spike"}, "`skip` must be one of 'never', 'non_finite', 'always'. Received: skip='spike'."),
    ):
        with pytest.raises(ValueError) as error:
            kx.callbacks.SpikeDetector(**options)
        assert str(error.value) == message


def test_whole_numbers_are_int32_whatever_floatx_is():
    # Keras gives numbers of Python, as sizes that are known, the width of floatx.
    detector = kx.callbacks.SpikeDetector(worst=1)
    keras.config.set_floatx("float16")
    try:
        built = keras.Sequential([keras.Input((3, 2)), kx.layers.LogitsDense(4, dtype="float32")])
        built.compile("sgd", kx.losses.SparseCategoricalCrossentropy(from_logits=True))
        x, y = np.zeros((2, 3, 2), "float32"), np.zeros((2, 3), "int32")
        x[1, 2] = np.nan
        with pytest.warns(UserWarning, match="in sequence 1 at 2"):
            fitted(built, detector, x, y)
    finally:
        keras.config.set_floatx("float32")
