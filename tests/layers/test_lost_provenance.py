"""Where logits lose their provenance the loss is right, and a warning says why."""

import warnings

import keras
import numpy as np
import pytest
from keras import ops

import keras_xent as kx
from tests.backend import BACKEND, to_numpy
from tests.internals import head_of
from tests.layers.models import FEATURES, LENGTH, VOCABULARY, data, language_model, loss, trained

if BACKEND == "tensorflow":
    import tensorflow as tf


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
            "The logits of layer 'vocabulary' are materialized, since the metric 'accuracy' of keras reads them; "
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
