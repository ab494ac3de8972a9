"""`fuse_head` changes how a loss is computed, and nothing else of a model."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_xent as kx
from keras_xent.layers.fuse_head import is_fused
from tests.backend import to_numpy
from tests.internals import mask_of
from tests.layers.models import FEATURES, VOCABULARY, assert_same_training, data, language_model, loss, trained
from tests.tiers import sample


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


def test_fuse_head_asks_which_of_several_outputs_is_the_head():
    inputs = keras.Input((4,))
    hidden = keras.layers.Dense(3)(inputs)
    model = keras.Model(inputs, [keras.layers.Dense(5, name="logits")(hidden), hidden])
    with pytest.raises(ValueError, match="with no layer that is known at its end. Name the output layer with `layer`"):
        kx.fuse_head(model)
    assert is_fused(kx.fuse_head(model, "logits").get_layer("logits"))


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
