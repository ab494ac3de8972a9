"""Evaluation of a model with a head computes the loss alone."""

import keras
import pytest

import keras_xent as kx
from tests.layers.models import data, language_model, loss, metrics
from tests.tiers import fast_for

HEADS = {
    "dense": lambda: language_model(kx.layers.LogitsDense),
    "tied": lambda: language_model(kx.layers.TiedLogits, tied=True),
    "fused": lambda: kx.layers.fuse_head(language_model(keras.layers.Dense)),
}


@fast_for("dense-*", "tied-True")
@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("name", HEADS)
def test_evaluation_forms_no_gradient(name, jit, formed):
    model = HEADS[name]()
    tokens, following, _ = data()
    model.compile("sgd", loss(), metrics=metrics(), jit_compile=jit)
    model.test_on_batch(tokens, following)
    model.evaluate(tokens, following, batch_size=8, verbose=0)
    assert not formed
    model.train_on_batch(tokens, following)
    assert {"hidden", "kernel"} <= formed
