"""Heads whose logits carry their provenance: the same model as with Keras' layers, without logits in training."""

import json
import subprocess
import sys
import warnings

import keras
import numpy as np
import pytest

import keras_xent as kx
from keras_xent.losses import SparseCategoricalCrossentropy
from tests.backend import BACKEND, environment, to_numpy, train_step_hlo
from tests.internals import head_of, set_sizes
from tests.layers.models import VOCABULARY, assert_same_training, data, language_model, loss, metrics, trained
from tests.tiers import sample, whole

if BACKEND == "tensorflow":
    import tensorflow as tf

FIT_MODES = {
    "auto": {},
    "xla": {"jit_compile": True},
    "no xla": {"jit_compile": False},
    "eagerly": {"run_eagerly": True},
    "three steps at once": {"steps_per_execution": 3},
}
if BACKEND == "jax":
    del FIT_MODES["xla"]


# The same training as with Keras' layers.


@pytest.mark.parametrize(
    "tied, mode",
    sample([*[(False, mode) for mode in FIT_MODES], (True, "auto")], [(True, "auto")]),
)
def test_training_is_that_of_the_dense_layer(tied, mode, calls):
    layers = (
        (keras.layers.ReversibleEmbedding, kx.layers.TiedLogits)
        if tied
        else (keras.layers.Dense, kx.layers.LogitsDense)
    )
    arguments = {"logit_soft_cap": 5.0} if tied else {}
    results = []
    for layer in layers:
        calls.clear()
        model = language_model(layer, tied=tied, **arguments)
        results.append(
            trained(model, loss(label_smoothing=0.1, z_loss=0.01), weighted_metrics=metrics(), **FIT_MODES[mode])
        )
        # TensorFlow's eager logits are there already; JAX traces the loss in any case.
        eager = mode == "eagerly" and BACKEND == "tensorflow"
        assert bool(calls) == (layer is layers[1] and not eager)
    assert_same_training(*results)


OPTIONS = (
    {"reduction": "sum_over_batch_size"},
    {"reduction": "sequence_mean"},
    {"normalizer": 50.0},
    {"class_weight": np.linspace(0.5, 2, VOCABULARY).tolist(), "logit_softcap": 4.0},
    {"dtype": "float64"} if BACKEND == "tensorflow" else {"label_smoothing": 1.0},
)


@pytest.mark.whole
@pytest.mark.parametrize("arguments", sample(OPTIONS, [OPTIONS[3]]), ids=lambda options: next(iter(options)))
def test_every_option_of_the_loss_trains_the_same(arguments):
    results = [
        trained(language_model(layer), loss(**arguments)) for layer in (keras.layers.Dense, kx.layers.LogitsDense)
    ]
    assert_same_training(*results)


@pytest.mark.parametrize("policy", sample(["mixed_bfloat16", "mixed_float16"], []))
def test_mixed_precision_trains_alike(policy):
    results = []
    for layer in (keras.layers.Dense, kx.layers.LogitsDense):
        keras.mixed_precision.set_global_policy(policy)
        try:
            results.append(trained(language_model(layer), loss(), metrics=metrics()[:1]))
        finally:
            keras.mixed_precision.set_global_policy("float32")
    for name in "loss", "val_perplexity":
        np.testing.assert_allclose(results[1][0][name], results[0][0][name], rtol=5e-4)


@pytest.mark.whole
def test_the_softmax_activation_keeps_provenance(calls):
    loss = SparseCategoricalCrossentropy(ignore_class=0)
    results = [
        trained(language_model(layer, activation="softmax"), loss)
        for layer in (keras.layers.Dense, kx.layers.LogitsDense)
    ]
    assert calls
    assert_same_training(*results)


@pytest.mark.whole
def test_gradient_accumulation_is_exact():
    results = []
    for layer in (keras.layers.Dense, kx.layers.LogitsDense):
        model = language_model(layer)
        tokens, following, _ = data()
        model.compile(keras.optimizers.SGD(0.1, gradient_accumulation_steps=2), loss(normalizer=40.0))
        history = model.fit(tokens, following, 8, 2, verbose=0, shuffle=False).history
        results.append((history, [np.asarray(w) for w in model.get_weights()]))
    assert_same_training(*results)


@whole
def test_a_frozen_head_stays_and_the_rest_trains(calls):
    results = []
    for layer in (keras.layers.Dense, kx.layers.LogitsDense):
        model = language_model(layer)
        model.layers[-1].trainable = False
        before = np.asarray(model.layers[-1].kernel)
        results.append(trained(model, loss()))
        np.testing.assert_array_equal(np.asarray(model.layers[-1].kernel), before)
    assert {call["gradients"] for call in calls} == {("hidden",)}
    assert_same_training(*results)


@pytest.mark.whole
def test_lora_on_the_head_trains_alike():
    results = []
    for layer in (keras.layers.Dense, kx.layers.LogitsDense):
        model = language_model(layer)
        model.layers[-1].enable_lora(2)
        results.append(trained(model, loss()))
    assert_same_training(*results)


@pytest.mark.whole
def test_a_model_inside_a_model_and_one_of_two_outputs(calls):
    def two_outputs(layer):
        inner = language_model(layer)
        tokens = keras.Input((None,), dtype="int32")
        logits = inner(tokens)
        other = keras.layers.Dense(VOCABULARY, name="other")(keras.layers.Embedding(VOCABULARY, 4)(tokens))
        model = keras.Model(tokens, {"main": logits, "other": other})
        x, y, _ = data()
        losses = {"main": loss(), "other": SparseCategoricalCrossentropy(from_logits=True)}
        model.compile("adam", losses, metrics={name: [kx.metrics.Perplexity(ignore_class=0)] for name in losses})
        history = model.fit(x, {"main": y, "other": x}, 8, 2, verbose=0, shuffle=False).history
        return history, [np.asarray(w) for w in model.get_weights()]

    with warnings.catch_warnings():
        # The other output has the shape of the fused one, and is suspected of having been made from it.
        warnings.simplefilter("ignore")
        results = [two_outputs(layer) for layer in (keras.layers.Dense, kx.layers.LogitsDense)]
    assert calls
    assert_same_training(*results)


# What the metrics reuse.


@whole
def test_metrics_reuse_the_statistics_of_the_loss(calls):
    model = language_model(kx.layers.LogitsDense)
    trained(model, loss(), weighted_metrics=metrics())
    # One trace for each batch size in training and in validation: a metric with a pass of its own would double them.
    traces = len(calls)
    calls.clear()
    trained(language_model(kx.layers.LogitsDense), loss())
    assert traces == len(calls)


@pytest.mark.whole
@pytest.mark.parametrize(
    "metric", sample(["same weights", "other weights", "another ignored class"], ["another ignored class"])
)
def test_metrics_with_other_weights_or_ignored_classes_are_right(metric):
    results = []
    for layer in (keras.layers.Dense, kx.layers.LogitsDense):
        own = kx.metrics.Perplexity(ignore_class=3 if metric == "another ignored class" else 0)
        given = {"weighted_metrics": [own]} if metric == "same weights" else {"metrics": [own]}
        results.append(trained(language_model(layer), loss(), **given))
    assert_same_training(*results)


@pytest.mark.whole
def test_keras_metrics_that_read_logits_still_do():
    results = [
        trained(language_model(layer), loss(), metrics=["accuracy"])
        for layer in (keras.layers.Dense, kx.layers.LogitsDense)
    ]
    assert_same_training(*results)


# The compiled step.


@pytest.mark.parametrize(
    "layer, expected",
    sample([(kx.layers.LogitsDense, False), (keras.layers.Dense, True)], [(kx.layers.LogitsDense, False)]),
)
def test_the_training_step_holds_no_logits(monkeypatch, layer, expected):
    """All buffers of the compiled step are smaller than the logits of its batch."""
    batch, length, classes = 16, 64, 4099
    set_sizes(monkeypatch.setattr, chunk_bytes=4 * classes * 64, fewest_rows=64)
    tokens = np.random.default_rng(0).integers(1, classes, (batch, length))
    model = keras.Sequential([keras.layers.Embedding(classes, 4), layer(classes)])
    model.compile("sgd", loss(), metrics=metrics() if layer is kx.layers.LogitsDense else [], jit_compile=True)
    model.fit(tokens, tokens, batch, verbose=0)
    text = train_step_hlo(model, tokens, tokens)
    assert (f"[{batch},{length},{classes}]" in text or f"[{batch * length},{classes}]" in text) == expected


if BACKEND == "tensorflow":

    @pytest.mark.parametrize("layer, expected", [(kx.layers.LogitsDense, False), (keras.layers.Dense, True)])
    def test_a_graph_for_batches_of_any_size_does_not_read_the_logits(layer, expected):
        """Not for their shape either, which TensorFlow would make them for."""
        model = language_model(layer)
        model.compile("sgd", loss(), metrics=metrics() if layer is kx.layers.LogitsDense else [])
        spec = tf.TensorSpec([None, None], "int64")
        graph = tf.function(model.train_step, autograph=False).get_concrete_function((spec, spec)).graph
        wanted, reached = [tensor.op for tensor in graph.outputs] + list(graph.control_outputs), set()
        while wanted:
            operation = wanted.pop()
            if operation not in reached:
                reached.add(operation)
                wanted += [tensor.op for tensor in operation.inputs] + list(operation.control_inputs)
        shapes = [tensor.shape.as_list() for operation in reached for tensor in operation.outputs if tensor.shape.rank]
        assert ([None, None, VOCABULARY] in shapes) == expected


# Saving.


@whole
@pytest.mark.parametrize("tied", [False, True], ids=["dense", "tied"])
def test_a_saved_model_goes_on_training_in_a_fresh_process(tmp_path, tied):
    model = language_model(kx.layers.TiedLogits if tied else kx.layers.LogitsDense, tied=tied)
    tokens, following, _ = data()
    model.compile(keras.optimizers.Adam(0.01), loss(), metrics=metrics())
    model.fit(tokens, following, verbose=0, shuffle=False)
    model.save(tmp_path / "model.keras")
    np.savez(tmp_path / "data.npz", tokens=tokens, following=following)
    program = f"""
import json, keras, numpy as np, keras_xent
model = keras.models.load_model({str(tmp_path / "model.keras")!r})
data = np.load({str(tmp_path / "data.npz")!r})
history = model.fit(data["tokens"], data["following"], verbose=0, shuffle=False).history
print(json.dumps(history))
"""
    child = subprocess.run([sys.executable, "-c", program], env=environment(), capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    expected = model.fit(tokens, following, verbose=0, shuffle=False).history
    resumed = json.loads(child.stdout.splitlines()[-1])
    assert resumed.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(resumed[name], values, rtol=1e-5)


def test_logits_are_those_of_the_dense_layer_in_predict_and_outside():
    layer, plain = kx.layers.LogitsDense(5), keras.layers.Dense(5)
    hidden = np.random.default_rng(0).standard_normal((2, 3, 4)).astype("float32")
    layer.build(hidden.shape), plain.build(hidden.shape)
    plain.set_weights(layer.get_weights())
    np.testing.assert_array_equal(to_numpy(layer(hidden)), to_numpy(plain(hidden)))
    assert layer.count_params() == plain.count_params()
    assert head_of(layer(hidden)).layer == layer.name


if BACKEND == "tensorflow":

    @whole
    def test_replicas_train_as_one_device_does():
        program = """
import tempfile
import keras, numpy as np, tensorflow as tf
from tests.callbacks.logs import scalars
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
)
from tests.layers import models as t
import keras_xent as kx
from keras_xent.layers.fuse_head import is_fused
tokens, following, _ = t.data(24)
def fit(scope):
    with scope:
        model = t.language_model(kx.layers.LogitsDense)
        model.compile(keras.optimizers.SGD(0.1), t.loss(), metrics=[kx.metrics.Perplexity(ignore_class=0)])
    with tempfile.TemporaryDirectory() as logs:
        callback = kx.callbacks.TensorBoard(logs, update_freq=1)
        model.fit(tokens, following, 8, 2, verbose=0, shuffle=False, callbacks=[callback])
        read = scalars(logs + "/train")
    logged = [read[tag][step] for tag in ("units/nll", "batch_loss", "tokens/valid_share") for step in range(1, 7)]
    evaluated = model.evaluate(tokens, following, 8, verbose=0)
    return model.get_weights(), evaluated + logged + list(read["tokens/valid"].values())
import contextlib
one = fit(contextlib.nullcontext())
two = fit(tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope())
print(max(np.abs(a - b).max() for a, b in zip(one[0], two[0])), np.abs(np.array(one[1]) - two[1]).max())
"""
        child = subprocess.run([sys.executable, "-c", program], env=environment(), capture_output=True, text=True)
        assert child.returncode == 0, child.stderr
        weights, evaluated = map(float, child.stdout.split()[-2:])
        assert weights < 1e-6
        assert evaluated < 1e-4
