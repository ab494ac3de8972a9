"""Perplexity is the exponential of the mean over tokens, whatever the batches."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_xent as kx
from tests import oracles
from tests.backend import MODES, tensor, to_numpy
from tests.internals import ExactSums, set_keras_mask
from tests.tiers import fast_for, whole


def example(shape, seed=0, classes=11):
    rng = np.random.default_rng(seed)
    return rng.integers(0, classes, shape), (2 * rng.standard_normal((*shape, classes))).astype("float32")


def nll(labels, logits):
    return oracles.sparse(labels.reshape(-1), logits.reshape(-1, logits.shape[-1]))[0].reshape(labels.shape)


def result(metric):
    return float(to_numpy(metric.result()))


def with_mask(logits, mask):
    logits = ops.convert_to_tensor(logits)
    set_keras_mask(logits, ops.convert_to_tensor(mask))
    return logits


def test_uniform_logits_have_perplexity_num_classes():
    metric = kx.metrics.Perplexity()
    metric.update_state(np.zeros((2, 3), int), np.zeros((2, 3, 131), "float32"))
    np.testing.assert_allclose(result(metric), 131, rtol=1e-6)


def test_every_token_counts_the_same_whatever_the_batch():
    """Batches of 32, 4 and 8 valid tokens and two lengths, marked in every way there is."""
    total = count = 0.0
    metrics = {how: kx.metrics.Perplexity(ignore_class=-1) for how in ("ignore_class", "mask", "weights", "all")}
    for seed, (length, valid) in enumerate(((16, 32), (16, 4), (4, 8))):
        labels, logits = example((2, length), seed)
        there = np.arange(2 * length).reshape(2, length) < valid
        losses = np.where(there, nll(labels, logits), 0)
        total, count = total + losses.sum(), count + valid
        poisoned = np.where(there[..., None], logits, np.nan)
        ignored = np.where(there, labels, -1)
        metrics["ignore_class"].update_state(ignored, poisoned)
        metrics["mask"].update_state(labels, with_mask(poisoned, there))
        metrics["weights"].update_state(labels, poisoned, sample_weight=there.astype("float32"))
        metrics["all"].update_state(ignored, with_mask(poisoned, there), sample_weight=there)
    for metric in metrics.values():
        np.testing.assert_allclose(result(metric), np.exp(total / count), rtol=1e-6)
        np.testing.assert_allclose(to_numpy(metric.nll()), total / count, rtol=1e-6)


def test_weights_weigh_tokens_and_examples():
    labels, logits = example((3, 4))
    losses = nll(labels, logits)
    for weights in (
        np.array([1.0, 0.5, 2.0]),
        np.array([[1.0], [0.5], [2.0]]),
        np.random.default_rng(1).uniform(size=(3, 4)),
    ):
        metric = kx.metrics.Perplexity()
        metric.update_state(labels, logits, sample_weight=weights)
        full = np.broadcast_to(weights.reshape(3, -1), (3, 4))
        np.testing.assert_allclose(result(metric), np.exp((full * losses).sum() / full.sum()), rtol=1e-6)


def test_probabilities_and_logits_agree():
    labels, logits = example((2, 5))
    metric = kx.metrics.Perplexity(from_logits=False)
    metric.update_state(labels, np.exp(logits) / np.exp(logits).sum(-1, keepdims=True))
    np.testing.assert_allclose(result(metric), np.exp(nll(labels, logits).mean()), rtol=1e-5)


def test_without_valid_tokens_the_result_is_nan_also_after_reset():
    metric = kx.metrics.Perplexity(ignore_class=0)
    assert np.isnan(result(metric))
    labels, logits = example((2, 3))
    metric.update_state(np.zeros((2, 3), int), logits)
    assert np.isnan(result(metric))
    metric.update_state(labels, logits)
    assert np.isfinite(result(metric))
    metric.reset_state()
    assert np.isnan(result(metric))


def test_a_perplexity_that_overflows_is_infinite_and_its_nll_finite():
    metric = kx.metrics.Perplexity()
    metric.update_state(np.array([0]), np.array([[0.0, 110.0]], "float32"))
    assert np.isposinf(result(metric))
    np.testing.assert_allclose(to_numpy(metric.nll()), 110.0, rtol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_counts_are_exact_beyond_two_to_the_24(mode):
    metric = keras.metrics.Metric(name="holder")
    sums = ExactSums(metric, "sums", 2)
    if mode == "jit":
        # Variables are state: JAX compiles the update as a function of them.
        import jax

        @jax.jit
        def updated(state, values):
            with keras.StatelessScope(list(zip(metric.variables, state, strict=True))) as scope:
                sums.add(values)
            return [scope.get_current_value(v) for v in metric.variables]

        def add(values):
            for variable, new in zip(
                metric.variables, updated([v.value for v in metric.variables], values), strict=True
            ):
                variable.assign(new)
    else:
        add = MODES[mode](sums.add)

    def update(value):
        add(tensor(np.float32([value, 1.0])))

    update(2.0**24)
    for _ in range(5):
        update(1.0)
    update(2.0**33)
    for _ in range(3):
        update(1.0)
    assert sums.exact().tolist() == [2**33 + 2**24 + 8, 10]


def test_the_arguments_survive():
    metric = kx.metrics.Perplexity(False, 3, 1, name="ppl", dtype="float64", logit_softcap=30.0)
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(metric))
    given = {
        "from_logits": False,
        "ignore_class": 3,
        "axis": 1,
        "name": "ppl",
        "dtype": "float64",
        "logit_softcap": 30.0,
    }
    config = again.get_config()
    assert {name: config[name] for name in given} == given


@fast_for("False")
@pytest.mark.parametrize("compiled", [True, False])
def test_fit_and_evaluate_report_the_true_value(compiled):
    labels, logits = example((10, 6), classes=7)
    labels[3:, 4:] = 0
    inputs = keras.Input((6, 7))
    model = keras.Model(inputs, keras.layers.Activation("linear")(inputs))
    model.compile(
        loss=kx.losses.MaskedSequenceCrossentropy(ignore_class=0, label_smoothing=0.1),
        metrics=[kx.metrics.Perplexity(ignore_class=0)],
        jit_compile=compiled,
    )
    there = labels != 0
    expected = np.exp(nll(labels, logits)[there].mean())
    history = model.fit(logits, labels, batch_size=4, verbose=0, validation_data=(logits, labels))
    np.testing.assert_allclose(history.history["perplexity"], expected, rtol=1e-5)
    np.testing.assert_allclose(history.history["val_perplexity"], expected, rtol=1e-5)
    evaluated = model.evaluate(logits, labels, batch_size=3, verbose=0, return_dict=True)
    np.testing.assert_allclose(evaluated["perplexity"], expected, rtol=1e-5)


@whole
def test_early_stopping_knows_that_less_is_better():
    labels, logits = example((8, 6), classes=7)
    inputs = keras.Input((6, 7))
    model = keras.Model(inputs, keras.layers.Dense(7)(inputs))
    model.compile("sgd", kx.losses.MaskedSequenceCrossentropy(), weighted_metrics=[kx.metrics.Perplexity()])
    stop = keras.callbacks.EarlyStopping(monitor="val_perplexity", patience=0)
    # A learning rate of 0: no epoch is better than the first, and the second ends the run.
    model.optimizer.learning_rate = 0.0
    history = model.fit(logits, labels, epochs=5, verbose=0, validation_data=(logits, labels), callbacks=[stop])
    assert stop.monitor_op(1.0, 2.0)
    assert len(history.epoch) == 2
