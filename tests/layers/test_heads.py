"""Heads whose logits carry their provenance: the same model as with Keras' layers, without logits in training."""

import json
import subprocess
import sys
import warnings

import keras
import numpy as np
import pytest
from keras import ops

import keras_xent as kx
from keras_xent.layers.fuse_head import is_fused
from keras_xent.losses import SparseCategoricalCrossentropy
from tests.backend import BACKEND, environment, to_numpy
from tests.internals import count_linear_calls, head_of, mask_of, set_sizes
from tests.tiers import sample, whole

if BACKEND == "tensorflow":
    import tensorflow as tf

VOCABULARY, FEATURES, LENGTH = 61, 8, 13
FIT_MODES = {
    "auto": {},
    "xla": {"jit_compile": True},
    "no xla": {"jit_compile": False},
    "eagerly": {"run_eagerly": True},
    "three steps at once": {"steps_per_execution": 3},
}
if BACKEND == "jax":
    del FIT_MODES["xla"]


def data(sequences=24):
    """Padded sequences, the next tokens, and weights."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, LENGTH, sequences)[:, None]
    tokens = np.where(np.arange(LENGTH) < lengths, rng.integers(1, VOCABULARY, (sequences, LENGTH)), 0)
    following = np.concatenate([tokens[:, 1:], np.zeros((sequences, 1), int)], axis=1)
    return tokens, following, rng.uniform(0.1, 2, sequences)


def language_model(head, *, tied=False, after=(), **arguments):
    """A model that ends in `head`, the same weights whatever the head is."""
    keras.utils.set_random_seed(0)
    tokens = keras.Input((None,), dtype="int32")
    if tied:
        # No mask: newer versions of Keras lose it at the logits, and Keras 3.12 makes a wrong one there.
        embedding = head(VOCABULARY, FEATURES, **arguments)
        hidden = keras.layers.Dense(FEATURES, activation="tanh")(embedding(tokens))
        logits = embedding(hidden, reverse=True)
    else:
        embedded = keras.layers.Embedding(VOCABULARY, FEATURES, mask_zero=True)(tokens)
        hidden = keras.layers.Dense(FEATURES, activation="tanh")(embedded)
        logits = head(VOCABULARY, **arguments)(hidden)
    for layer in after:
        logits = layer(logits)
    return keras.Model(tokens, logits)


def trained(model, loss, *, metrics=(), weighted_metrics=None, **compile_arguments):
    """The history and weights after two epochs with validation."""
    tokens, following, weights = data()
    model.compile(
        keras.optimizers.Adam(0.01), loss, metrics=list(metrics), weighted_metrics=weighted_metrics, **compile_arguments
    )
    validation = (tokens[:8], following[:8], weights[:8])
    history = model.fit(
        tokens, following, 8, 2, verbose=0, sample_weight=weights, validation_data=validation, shuffle=False
    ).history
    return history, [np.asarray(w) for w in model.get_weights()]


def assert_same_training(one, other, rtol=1e-5):
    assert one[0].keys() == other[0].keys()
    for name, values in one[0].items():
        np.testing.assert_allclose(other[0][name], values, rtol=rtol, err_msg=name)
    for mine, theirs in zip(one[1], other[1], strict=True):
        np.testing.assert_allclose(theirs, mine, atol=rtol)


def loss(**arguments):
    return kx.losses.MaskedSequenceCrossentropy(ignore_class=0, **arguments)


def metrics():
    return [kx.metrics.Perplexity(ignore_class=0), kx.metrics.TokenAccuracy(ignore_class=0)]


@pytest.fixture
def calls(monkeypatch):
    """How often the linear kernel is called."""
    return count_linear_calls(monkeypatch)


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
        np.testing.assert_allclose(results[1][0][name], results[0][0][name], rtol=0.01)


@pytest.mark.whole
def test_the_softmax_activation_keeps_provenance(calls):
    loss = SparseCategoricalCrossentropy(ignore_class=0)
    results = [
        trained(language_model(layer, activation="softmax"), loss)
        for layer in (keras.layers.Dense, kx.layers.LogitsDense)
    ]
    # JAX's tracers do not remember the logits behind an activation.
    assert bool(calls) == (BACKEND == "tensorflow")
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
    text = compiled_step(model, tokens)
    assert (f"[{batch},{length},{classes}]" in text or f"[{batch * length},{classes}]" in text) == expected


def compiled_step(model, tokens):
    if BACKEND == "tensorflow":
        step = tf.function(model.train_step, jit_compile=True, autograph=False)
        return step.experimental_get_compiler_ir((tf.constant(tokens), tf.constant(tokens)))(stage="optimized_hlo")
    import jax

    state = model._get_jax_state(
        trainable_variables=True, non_trainable_variables=True, optimizer_variables=True, metrics_variables=True
    )
    step = jax.jit(lambda state, data: model.train_step(state, data))
    return step.lower(state, (tokens, tokens)).compile().as_text()


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


# Provenance that gets lost.


class Doubled(keras.layers.Layer):
    def call(self, inputs):
        return ops.multiply(inputs, 2.0)


def test_a_detached_head_warns_once_with_the_layer_and_the_fix(calls):
    model = language_model(kx.layers.LogitsDense, name="vocabulary", after=[Doubled()])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trained(model, loss())
    messages = [str(w.message) for w in caught if "provenance" in str(w.message)]
    assert messages == [
        "MaskedSequenceCrossentropy materializes the logits of layer 'vocabulary': what comes after the layer "
        "returns a new tensor, which carries no provenance. End the model in that layer. The loss reads 16-bit logits "
        "as they are, so that a float32 Activation after it is not needed."
    ]
    assert calls == []


if BACKEND == "tensorflow":

    @pytest.mark.whole
    def test_another_output_of_the_same_shape_is_not_a_detached_head():
        tokens, following, _ = data()
        inputs = keras.Input((LENGTH,))
        hidden = keras.layers.Embedding(VOCABULARY, FEATURES)(inputs)
        outputs = {"a": kx.layers.LogitsDense(VOCABULARY)(hidden), "b": keras.layers.Dense(VOCABULARY)(hidden)}
        model = keras.Model(inputs, outputs)
        model.compile("adam", {"a": loss(), "b": loss()})
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            model.train_on_batch(tokens, {"a": following, "b": following})


@pytest.mark.whole
def test_live_logits_of_another_program_are_not_mistaken_for_these():
    """Eager ones belong to no program: neither to that of the next loss, nor to one another."""
    layer, hidden = kx.layers.LogitsDense(5), np.ones((2, 3, 4), "float32")
    alive, labels = layer(hidden), np.zeros((2, 3), int)
    plain = ops.convert_to_tensor(to_numpy(alive).astype("float32"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        eager = loss()(labels, plain)
        if BACKEND == "tensorflow":
            compiled = tf.function(lambda logits: loss()(labels, logits))(plain)
        else:
            import jax

            compiled = jax.jit(lambda logits: loss()(labels, logits))(plain)
    np.testing.assert_allclose(to_numpy(compiled), to_numpy(eager), rtol=1e-6)
    assert head_of(alive) is not None


@pytest.mark.whole
def test_a_metric_that_reads_logits_works_and_warns_once():
    model = language_model(kx.layers.LogitsDense, name="vocabulary")
    metrics = [kx.metrics.TokenAccuracy(ignore_class=0), kx.metrics.Perplexity(ignore_class=0)]
    told = []
    for extra in [], [keras.metrics.SparseCategoricalAccuracy(name="accuracy")]:
        model.compile("adam", loss(), metrics=[*metrics, *extra])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            tokens, following, _ = data()
            model.fit(tokens, following, epochs=2, verbose=0)
            found = model.evaluate(tokens, following, verbose=0, return_dict=True)
        told.append([str(w.message) for w in caught if "logits" in str(w.message)])
    labels = following[tokens != 0]
    assert found["accuracy"] == pytest.approx(
        np.mean(model.predict(tokens, verbose=0)[tokens != 0].argmax(-1) == labels)
    )
    assert told == [
        [],
        [
            "The logits of layer 'vocabulary' are materialized, since the metric 'accuracy' reads them; "
            "MaskedSequenceCrossentropy alone does not. Nor do keras_xent.metrics.TokenAccuracy and Perplexity."
        ],
    ]


@pytest.mark.whole
def test_a_linear_activation_in_float32_keeps_provenance(calls):
    """Keras' own advice for mixed precision."""
    keras.mixed_precision.set_global_policy("mixed_bfloat16")
    try:
        model = language_model(kx.layers.LogitsDense, after=[keras.layers.Activation("linear", dtype="float32")])
        with warnings.catch_warnings():
            warnings.simplefilter("error" if BACKEND == "tensorflow" else "ignore", UserWarning)
            trained(model, loss())
    finally:
        keras.mixed_precision.set_global_policy("float32")
    # JAX's tracers do not tell what they were cast from.
    assert bool(calls) == (BACKEND == "tensorflow")


# Models that exist.


@pytest.mark.whole
@pytest.mark.parametrize("tied", sample([False, True], [False]))
def test_fuse_head_changes_the_call_and_nothing_else(calls, tied):
    tokens, _, _ = data()
    head = keras.layers.ReversibleEmbedding if tied else keras.layers.Dense
    plain, model = language_model(head, tied=tied), language_model(head, tied=tied)
    before = model.predict(tokens, verbose=0)
    assert kx.fuse_head(model) is model
    assert [type(layer) for layer in model.layers] == [type(layer) for layer in plain.layers]
    assert sum(map(is_fused, model.layers)) == 1
    np.testing.assert_array_equal(model.predict(tokens, verbose=0), before)
    assert_same_training(trained(plain, loss()), trained(model, loss()))
    assert calls


def test_tied_logits_take_the_mask_of_their_embeddings_and_give_none():
    layer = kx.layers.TiedLogits(VOCABULARY, FEATURES, mask_zero=True)
    embedded = layer(np.array([[1, 0]]))
    assert to_numpy(mask_of(embedded)).tolist() == [[True, False]]
    logits = layer(ops.ones((1, 2, FEATURES)), reverse=True)
    assert mask_of(logits) is None


def test_fuse_head_after_fit_is_used_in_the_next_fit(calls):
    model = language_model(keras.layers.Dense)
    trained(model, loss())
    assert calls == []
    kx.fuse_head(model)
    tokens, following, _ = data()
    model.fit(tokens, following, verbose=0)
    assert calls


def test_fuse_head_finds_the_head_of_sequential_and_nested_models():
    inner = keras.Sequential([keras.layers.Embedding(9, 4), keras.layers.Dense(9), keras.layers.Activation("linear")])
    inner.build((None, 3))
    outer_input = keras.Input((3,))
    outer = keras.Model(outer_input, inner(outer_input))
    kx.fuse_head(outer)
    assert is_fused(inner.layers[1])
    assert kx.fuse_head(outer) is outer


def test_fuse_head_says_what_it_cannot_do():
    tokens = keras.Input((4,))
    conv = keras.Model(tokens, keras.layers.Rescaling(2.0, name="scaled")(tokens), name="other")
    with pytest.raises(ValueError) as error:
        kx.fuse_head(conv)
    assert str(error.value) == (
        "`model` must end in a `keras.layers.Dense` or a `keras.layers.ReversibleEmbedding`. Received: model 'other' "
        "with layer 'scaled' of class Rescaling at its end. Name the output layer with `layer`, or build the model "
        "with `keras_xent.layers.LogitsDense`."
    )
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="out")])
    with pytest.raises(ValueError) as error:
        kx.fuse_head(model, layer="in")
    assert str(error.value) == "`layer` must be a layer of the model or its name, one of 'out'. Received: 'in'."
    assert is_fused(kx.fuse_head(model, layer="out").layers[-1])


def test_a_head_that_is_no_matrix_is_left_alone_with_a_warning():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="out")])
    model.quantize("float8")
    with pytest.warns(UserWarning, match="^fuse_head leaves layer 'out' as it is, since it is quantized"):
        kx.fuse_head(model)
    assert not is_fused(model.layers[-1])
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="out")])
    model.quantize("int8")
    assert is_fused(kx.fuse_head(model).layers[-1])


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
from tests.layers import test_heads as t
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
