"""A fused model saves, copies and loads as the plain one, and a head of any kind can be quantized."""

import copy
import pickle
import warnings

import keras
import numpy as np
import pytest

import keras_xent as kx
from keras_xent.layers.fuse_head import is_fused
from tests.backend import to_numpy
from tests.tiers import fast_for, sample

X = np.random.default_rng(0).integers(1, 50, (2, 8)).astype("int32")


def dense(**arguments):
    return keras.Sequential([keras.Input((8,)), keras.layers.Embedding(50, 4), keras.layers.Dense(50, **arguments)])


def tied(**arguments):
    tokens = keras.Input((8,), dtype="int32")
    embedding = keras.layers.ReversibleEmbedding(50, 4, name="head", **arguments)
    return keras.Model(tokens, embedding(keras.layers.Dense(4)(embedding(tokens)), reverse=True))


def fused(model):
    kx.fuse_head(model)
    assert any(map(is_fused, model.layers))
    return model


def untied():
    return tied(tie_weights=False)


def with_lora():
    model = dense()
    model.layers[-1].enable_lora(2)
    return model


def same(one, other):
    np.testing.assert_allclose(other.predict(X, verbose=0), one.predict(X, verbose=0), rtol=1e-6, atol=1e-8)


@fast_for("with_lora")
@pytest.mark.parametrize("build", [dense, tied, untied, with_lora])
def test_a_file_of_weights_works_both_ways(build, tmp_path):
    path = tmp_path / "w.weights.h5"
    for one, other in ((fused(build()), build()), (build(), fused(build()))):
        one.save_weights(path)
        other.load_weights(path)
        same(one, other)


def list_of(heads, *, tied=False, last=()):
    """A model of several dense layers, of which the heads are of a given class."""
    keras.utils.set_random_seed(len(heads))
    tokens = keras.Input((8,), dtype="int32")
    if tied:
        embedding = heads[0](50, 4)
        return keras.Model(tokens, embedding(keras.layers.Dense(4)(embedding(tokens)), reverse=True))
    hidden = keras.layers.Dense(4)(keras.layers.Embedding(50, 4)(tokens))
    outputs = [head(50)(hidden) for head in (*heads, *last)]
    return keras.Model(tokens, outputs if len(outputs) > 1 else outputs[0])


@pytest.mark.parametrize("skip_mismatch", [False, True])
@pytest.mark.parametrize("kind", ["one", "two", "tied"])
def test_our_layers_read_files_of_models_with_those_of_keras(kind, skip_mismatch, tmp_path):
    plain, own = keras.layers.Dense, kx.layers.LogitsDense
    if kind == "tied":
        plain, own = keras.layers.ReversibleEmbedding, kx.layers.TiedLogits
    heads, tied = 2 if kind == "two" else 1, kind == "tied"
    one, other = list_of([plain] * heads, tied=tied), list_of([own] * heads, tied=tied)
    one.save_weights(tmp_path / "w.weights.h5")
    other.load_weights(tmp_path / "w.weights.h5", skip_mismatch=skip_mismatch)
    for weights, expected in zip(other.get_weights(), one.get_weights(), strict=True):
        np.testing.assert_array_equal(weights, expected)


def test_our_layers_read_no_entry_of_another_layer(tmp_path):
    plain, own = keras.layers.Dense, kx.layers.LogitsDense
    list_of([plain, plain]).save_weights(tmp_path / "w.weights.h5")
    with pytest.raises(ValueError, match="1 objects could not be loaded(?s:.)*`keras_xent.fuse_head"):
        list_of([own], last=[plain]).load_weights(tmp_path / "w.weights.h5")
    # Keras numbers the layers of each class by themselves, and cannot tell either.
    list_of([own]).save_weights(tmp_path / "w.weights.h5")
    with pytest.raises(ValueError, match="objects could not be loaded"):
        list_of([plain]).load_weights(tmp_path / "w.weights.h5")


@pytest.mark.whole
@pytest.mark.parametrize("build", sample([dense, tied, untied, with_lora], [tied]))
def test_a_fused_model_is_saved_copied_and_pickled_as_the_plain_one(build, tmp_path):
    model = fused(build())
    model.compile("sgd", kx.losses.MaskedSequenceCrossentropy())
    model.fit(X, X, verbose=0)
    model.save(tmp_path / "model.keras")
    copies = keras.models.load_model(tmp_path / "model.keras"), copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for other in copies:
        same(model, other)
        assert [type(layer) for layer in other.layers] == [type(layer) for layer in build().layers]
        fused(other)
        other.compile("sgd", kx.losses.MaskedSequenceCrossentropy())
        expected = model.evaluate(X, X, verbose=0)
        np.testing.assert_allclose(other.evaluate(X, X, verbose=0), expected, rtol=1e-5)


@pytest.mark.whole
@pytest.mark.parametrize("mode", sample(["int8", "int4"], ["int8"]))
@pytest.mark.parametrize(
    "build", sample(["LogitsDense", "TiedLogits", "fused Dense", "fused ReversibleEmbedding"], ["LogitsDense"])
)
def test_a_head_is_quantized_as_that_of_keras(build, mode):
    keras.utils.set_random_seed(0)
    if build == "LogitsDense":
        head = kx.layers.LogitsDense(50, name="head")
        model = keras.Sequential([keras.Input((8,)), keras.layers.Embedding(50, 4), head])
    elif build == "TiedLogits":
        tokens, head = keras.Input((8,), dtype="int32"), kx.layers.TiedLogits(50, 4, name="head")
        model = keras.Model(tokens, head(keras.layers.Dense(4)(head(tokens)), reverse=True))
    else:
        model = fused(dense(name="head") if "Dense" in build else tied())
        head = model.get_layer("head")
    before = model.predict(X, verbose=0)
    model.quantize(mode)
    assert head.quantization_mode == mode
    logits = model.predict(X, verbose=0)
    # int4 has 15 levels.
    np.testing.assert_allclose(logits, before, atol=np.abs(before).max() * (0.05 if mode == "int8" else 0.5))
    model.compile("sgd", kx.losses.MaskedSequenceCrossentropy(), metrics=[kx.metrics.Perplexity()])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loss, perplexity = model.evaluate(X, X, verbose=0)
    shifted = logits - logits.max(-1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    expected = -np.take_along_axis(log_p, X[..., None], -1).mean()
    np.testing.assert_allclose([loss, np.log(perplexity)], expected, rtol=1e-5)
    told = [str(w.message) for w in caught if w.category is UserWarning]
    assert not told


PER_CLASS = keras.quantizers.Int4QuantizationConfig(block_size=-1)
GROUPS = keras.quantizers.Int4QuantizationConfig(block_size=4)
INT8 = keras.quantizers.Int8QuantizationConfig()


@fast_for("dense-int4 groups", "tied-int8")
@pytest.mark.parametrize("config", [INT8, GROUPS, PER_CLASS], ids=["int8", "int4 groups", "int4"])
@pytest.mark.parametrize("kind", ["dense", "tied", "untied"])
def test_a_loss_of_a_quantized_head_has_the_value_and_gradient_of_its_dequantized_kernel(kind, config):
    rng = np.random.default_rng(0)
    inputs, labels = rng.normal(size=(4, 6, 8)).astype("float32"), rng.integers(0, 50, (4, 6))
    source, given = keras.layers.Dense(8, kernel_initializer="identity", use_bias=False), keras.Input((6, 8))
    if kind == "dense":
        head = kx.layers.LogitsDense(50, bias_initializer="normal")
        model = keras.Model(given, head(source(given)))
    else:
        head = kx.layers.TiedLogits(50, 8, tie_weights=kind == "tied", logit_soft_cap=3.0)
        model = keras.Model(given, head(source(given), reverse=True))
    head.quantize(config.mode, type_check=False, config=config)
    # What the layer says of the unit vectors, which are not rounded.
    kernel = np.eye(8, dtype="float32")
    kernel = np.asarray(to_numpy(head(kernel) if kind == "dense" else head(kernel, reverse=True)), "float64")
    bias = to_numpy(head.bias) if kind == "dense" else 0.0
    kernel = kernel - bias if kind == "dense" else 3 * np.arctanh(kernel / 3)
    rounded = inputs.astype("float64")
    if head.inputs_quantizer and (kind != "dense" or config is not GROUPS):
        scale_of_inputs = 127 / np.abs(inputs).max(-1, keepdims=True).astype("float64")
        rounded = np.round(inputs * scale_of_inputs) / scale_of_inputs
    x = rounded @ kernel
    x = x + bias if kind == "dense" else 3 * np.tanh(x / 3)
    p = np.exp(x) / np.exp(x).sum(-1, keepdims=True)
    right = -np.log(np.take_along_axis(p, labels[..., None], -1)).mean()
    d = (p - np.eye(50)[labels]) / labels.size * (1.0 if kind == "dense" else 1 - (x / 3) ** 2)
    loss = kx.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(1.0), loss, metrics=[kx.metrics.Perplexity()])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        value, perplexity = model.train_on_batch(inputs, labels)
    assert not [w for w in caught if "materializ" in str(w.message)]
    np.testing.assert_allclose([value, np.log(perplexity)], right, rtol=1e-6)
    # Keras' gradient too passes the rounding of the inputs.
    gradient = np.einsum("bti,btj->ij", inputs, d @ kernel.T)
    np.testing.assert_allclose(to_numpy(source.kernel), np.eye(8) - gradient, atol=1e-6 * np.abs(gradient).max() + 2e-7)


@fast_for("LogitsDense")
@pytest.mark.parametrize("kind", [kx.layers.LogitsDense, kx.layers.TiedLogits])
def test_a_head_may_be_rematerialized(kind):
    with keras.RematScope(mode="full"):
        head = kind(50) if kind is kx.layers.LogitsDense else kind(50, 8)
    tokens = keras.Input((8,))
    hidden = keras.layers.Embedding(50, 8)(tokens)
    model = keras.Model(tokens, head(hidden) if kind is kx.layers.LogitsDense else head(hidden, reverse=True))
    model.compile("sgd", kx.losses.MaskedSequenceCrossentropy())
    assert np.isfinite(model.fit(X, X, verbose=0).history["loss"][0])
    assert model.predict(X, verbose=0).shape == (2, 8, 50)
