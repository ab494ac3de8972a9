"""Steps that are left out: everything is as if their batches had not been there."""

import contextlib
import warnings

import keras
import numpy as np
import pytest
from keras import ops

import keras_xent as kx
from tests.backend import BACKEND, to_numpy
from tests.tiers import sample, whole

BATCH, BATCHES, FEATURES, CLASSES = 4, 14, 6, 5
# Batch 1 is no number, batch 4 has a gradient that is none, and batches 12 and 13 are spikes.
NOT_FINITE, SPIKES = [1, 4], [12, 13]


def data():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((BATCHES, BATCH, FEATURES)).astype("float32")
    y, weights = rng.integers(0, CLASSES, (BATCHES, BATCH)), np.ones((BATCHES, BATCH), "float32")
    x[1, 2, 3] = np.nan
    x[4] = 0.0
    x[12:] *= np.array([200.0, 900.0], "float32")[:, None, None]
    return x, y, weights


def model_of(steps=1, scaled=False, use_ema=True, **options):
    """A model with moving averages, random numbers and an optimizer with momentum and a clipped gradient."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((FEATURES,))
    hidden = keras.layers.Dense(8, use_bias=False)(inputs)
    # The size, whose derivative at 0 is none.
    hidden = ops.sqrt(ops.square(hidden))
    outputs = keras.layers.Dense(CLASSES)(keras.layers.Dropout(0.3)(hidden))
    averaged = keras.layers.BatchNormalization()(inputs)
    outputs = outputs + keras.layers.Dense(CLASSES, kernel_regularizer="l2")(averaged)
    model = keras.Model(inputs, outputs)
    optimizer = keras.optimizers.Adam(1e-3, clipnorm=1.0, use_ema=use_ema)
    loss = kx.losses.SparseCategoricalCrossentropy(from_logits=True)
    if scaled:
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=2.0**4)
    model.compile(optimizer, loss, metrics=[kx.metrics.Perplexity(), "accuracy"], **options)
    return kx.accumulate_gradients(model, steps)


def trained(skip, left_out=(), callbacks=(), model=None, **options):
    """All that a model holds after an epoch without some batches, its history, and the detector."""
    model = model_of(**options) if model is None else model
    x, y, weights = (np.delete(one, list(left_out), axis=0) for one in data())
    x, y, weights = x.reshape(-1, FEATURES), y.ravel(), weights.ravel()
    detector = kx.callbacks.SpikeDetector(3.0, skip=skip)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The loss of batch")
        rows = {"batch_size": BATCH, "shuffle": False, "verbose": 0, "epochs": 1}
        history = model.fit(x, y, sample_weight=weights, callbacks=[detector, *callbacks], **rows).history
    state = [*model.variables, *model.optimizer.variables]
    return [to_numpy(variable.value) for variable in state], history, detector, model


def assert_identical(one, other):
    for before, after in zip(one[0], other[0], strict=True):
        np.testing.assert_array_equal(before, after)
    assert {k: v for k, v in one[1].items() if k in other[1]} == other[1]


MODES = {
    "auto": {},
    "XLA": {"jit_compile": True},
    "eager": {"run_eagerly": True},
    "two steps": {"steps_per_execution": 2},
    "accumulated": {"steps": 2},
}


@pytest.mark.parametrize("mode", sample(MODES, ["auto"]))
def test_it_is_as_if_the_batches_had_not_been_there(mode):
    with_all = trained("always", **MODES[mode])
    assert_identical(with_all, trained("always", NOT_FINITE + SPIKES, **MODES[mode]))
    detector, model = with_all[2:]
    assert detector.num_skipped == 4
    assert int(to_numpy(model.optimizer.iterations.value)) == BATCHES - 4
    assert np.isfinite(with_all[1]["loss"]).all() and np.isfinite(with_all[1]["perplexity"]).all()
    if "steps_per_execution" not in MODES[mode]:
        kinds = [(report["batch"], report["kind"], report["skipped"]) for report in detector.reports]
        expected = [(batch, "non_finite", True) for batch in NOT_FINITE] + [(batch, "spike", True) for batch in SPIKES]
        assert kinds == expected
        # The loss of the batch whose gradient is none is one.
        assert np.isnan(detector.reports[0]["loss"]) and np.isfinite(detector.reports[1]["loss"])


def test_only_what_is_asked_for_is_skipped():
    detector = trained("non_finite")[2]
    assert detector.num_skipped == 2
    skipped = {report["batch"]: report["skipped"] for report in detector.reports}
    assert {batch for batch, is_skipped in skipped.items() if is_skipped} == set(NOT_FINITE)
    assert SPIKES[0] in skipped


@whole
def test_the_detector_without_a_bad_batch_changes_nothing():
    found = trained("always", NOT_FINITE + SPIKES, model=model_of())
    model = model_of()
    x, y, weights = (np.delete(one, NOT_FINITE + SPIKES, axis=0) for one in data())
    options = {"sample_weight": weights.ravel(), "batch_size": BATCH, "shuffle": False, "verbose": 0}
    history = model.fit(x.reshape(-1, FEATURES), y.ravel(), **options).history
    for name, values in history.items():
        np.testing.assert_allclose(found[1][name], values, rtol=1e-6)
    for one, other in zip(found[3].get_weights(), model.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)


@whole
def test_a_scaled_loss_keeps_its_scale_where_the_batch_is_to_blame():
    bad = [1, *SPIKES]
    whole_run, without = (trained("always", left_out, scaled=True) for left_out in ([4], [4, *bad]))
    assert_identical(whole_run, without)
    assert float(to_numpy(whole_run[3].optimizer.dynamic_scale.value)) == 2.0**4
    # An infinite gradient of a finite loss may come of the scale, and is the optimizer's own.
    lowered = trained("always", [], scaled=True)[3].optimizer.dynamic_scale
    assert float(to_numpy(lowered.value)) == 2.0**3


@whole
def test_the_norm_of_the_gradient_is_that_of_steps_that_were_made():
    norms = []

    class Norms(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            # That of the batch before.
            norms.append(logs.get("gradient_norm"))

    names = {"tokens_per_second": False, "valid_share": False}
    statistics = kx.callbacks.TrainingStatistics(gradient_norm=True, update_freq=1, **names)
    with_all = trained("always", callbacks=[statistics, Norms()])
    made = [norm for batch, norm in enumerate(norms[1:]) if batch not in NOT_FINITE + SPIKES]
    norms.clear()
    statistics = kx.callbacks.TrainingStatistics(gradient_norm=True, update_freq=1, **names)
    without = trained("always", NOT_FINITE + SPIKES, callbacks=[statistics, Norms()])
    assert_identical(with_all, without)
    # The last of them is not in the logs of a batch any more.
    assert made[:-1] == norms[1:]
    assert np.isfinite(made).all() and with_all[1]["gradient_norm"] == [made[-1]]


@whole
def test_a_train_step_of_ones_own_is_skipped():
    class Model(keras.Model):
        """On each backend the loop that its guide shows."""

        def train_step(self, *given):
            return super().train_step(*given)

    def own():
        model = model_of()
        other = Model(model.inputs, model.outputs)
        other.compile(keras.optimizers.Adam(1e-3), model.loss, metrics=[kx.metrics.Perplexity()])
        return other

    assert_identical(trained("always", model=own()), trained("always", NOT_FINITE + SPIKES, model=own()))


@whole
def test_training_without_it_is_as_before():
    # Keras on JAX does not fit a model twice with moving averages of its weights: both are then one buffer.
    model = model_of(use_ema=False)
    own = {name: vars(model).get(name) for name in ("train_step", "compute_loss")}
    trained("always", NOT_FINITE + SPIKES, model=model)
    assert {name: vars(model).get(name) for name in own} == own
    # Of the same model, once more, in micro-batches.
    accumulated = kx.accumulate_gradients(model, 2)
    step = accumulated.train_step
    trained("always", NOT_FINITE + SPIKES, model=accumulated)
    assert accumulated.train_step is step


def test_a_fit_that_was_interrupted_leaves_the_next_one_alone():
    class Interrupt(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            raise KeyboardInterrupt

    model = model_of(use_ema=False)
    with pytest.raises(KeyboardInterrupt):
        trained("always", NOT_FINITE + SPIKES, [Interrupt()], model=model)
    x, y, _ = data()
    model.fit(x[1], y[1], BATCH, verbose=0)
    assert np.isnan(to_numpy(model.trainable_weights[0].value)).any()


def test_a_model_that_is_no_graph_of_layers_is_watched_after_it_was_built():
    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = keras.layers.Dense(CLASSES)

        def call(self, x):
            return self.dense(x)

    model, (x, y, _) = Model(), data()
    model.compile("sgd", kx.losses.SparseCategoricalCrossentropy(from_logits=True))
    model(x[0])
    for _ in range(2):
        detector = kx.callbacks.SpikeDetector(skip="non_finite")
        statistics = kx.callbacks.TrainingStatistics(tokens_per_second=False, valid_share=False, gradient_norm=True)
        with pytest.warns(UserWarning, match="Its step was skipped."):
            history = model.fit(x[1], y[1], BATCH, verbose=0, callbacks=[statistics, detector]).history
        # No step was made.
        assert detector.num_skipped == 1 and history["gradient_norm"] == [0.0]
    # Those of the fit before have left the model.
    assert sum(type(one).__name__ == "BatchLoss" for one in model.metrics) == 1


def test_metrics_that_leave_out_those_of_keras_are_an_error_on_jax():
    class Model(keras.Sequential):
        own = keras.metrics.Mean(name="own")

        @property
        def metrics(self):
            return [self.own]

    model = Model([keras.Input((FEATURES,)), keras.layers.Dense(CLASSES)])
    model.compile("sgd", kx.losses.SparseCategoricalCrossentropy(from_logits=True))
    refused = pytest.raises(ValueError, match="The property `metrics` of Model must return `super...metrics` too")
    # On TensorFlow a step may assign any variable.
    with refused if BACKEND == "jax" else contextlib.nullcontext():
        _, _, detector, _ = trained("non_finite", model=model)
        assert detector.num_skipped == 1


@whole
def test_two_detectors_in_one_fit_are_an_error():
    model = model_of()
    detectors = [kx.callbacks.SpikeDetector(), kx.callbacks.SpikeDetector()]
    with pytest.raises(ValueError, match="can have one SpikeDetector only"):
        model.fit(np.ones((4, FEATURES)), np.zeros(4), verbose=0, callbacks=detectors)
