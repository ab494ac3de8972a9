"""A language model of KerasHub, from its configuration with random weights: fused, it is trained as before."""

import importlib.util

import keras
import numpy as np
import pytest

import keras_xent as kx
from keras_xent._without_logits import call_without_logits
from keras_xent.layers.fuse_head import is_fused
from tests.tiers import sample

# keras-hub asks for a newer Keras than the oldest one that this package serves. It is imported where it is used, since
# that takes seconds.
if importlib.util.find_spec("keras_hub") is None:
    pytest.skip("keras-hub is not installed: pip install '.[hub]'", allow_module_level=True)

VOCABULARY, LENGTH = 101, 12


def language_model(*, lora):
    import keras_hub

    keras.utils.set_random_seed(0)
    sizes = {"num_layers": 1, "num_heads": 2, "hidden_dim": 16, "intermediate_dim": 16}
    backbone = keras_hub.models.GPT2Backbone(VOCABULARY, max_sequence_length=LENGTH, dropout=0.0, **sizes)
    if lora:
        backbone.enable_lora(2)
    return keras_hub.models.GPT2CausalLM(backbone, preprocessor=None)


@pytest.mark.parametrize("lora", sample([False, True], []), ids=["all weights", "LoRA"])
def test_a_causal_language_model_trains_and_generates_as_before(lora):
    tokens = np.random.default_rng(0).integers(1, VOCABULARY, (12, LENGTH)).astype("int32")
    inputs = {"token_ids": tokens, "padding_mask": np.ones(tokens.shape, bool)}
    prompt = {"token_ids": tokens[:2] * (np.arange(LENGTH) < 4), "padding_mask": np.tile(np.arange(LENGTH) < 4, (2, 1))}
    weights, histories, generated = [], [], []
    for fused in False, True:
        model = language_model(lora=lora)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        if fused:
            kx.fuse_head(model)
            assert is_fused(model.backbone.token_embedding)
            loss = kx.losses.MaskedSequenceCrossentropy()
        perplexity = kx.metrics.Perplexity()
        model.compile(optimizer=keras.optimizers.Adam(0.01), loss=loss, weighted_metrics=[perplexity], sampler="greedy")
        following = np.roll(tokens, -1, 1)
        histories.append(model.fit(inputs, following, batch_size=4, epochs=3, verbose=0, shuffle=False).history)
        weights.append([np.asarray(w) for w in model.get_weights()])
        generated.append(np.asarray(model.generate(prompt, stop_token_ids=None)["token_ids"]))
    for name, values in histories[0].items():
        np.testing.assert_allclose(histories[1][name], values, rtol=1e-5)
    for mine, theirs in zip(*weights, strict=True):
        np.testing.assert_allclose(theirs, mine, atol=1e-5)
    np.testing.assert_array_equal(*generated)


def test_log_probabilities_of_a_causal_language_model_are_those_of_its_logits():
    """Its output layer is an embedding inside its backbone, and is found there; padding counts for nothing."""
    model = language_model(lora=False)
    tokens = np.random.default_rng(1).integers(1, VOCABULARY, (3, LENGTH)).astype("int32")
    mask = np.arange(LENGTH) < np.array([12, 7, 3])[:, None]
    inputs, following = {"token_ids": tokens, "padding_mask": mask}, np.roll(tokens, -1, 1)
    assert call_without_logits(model, inputs).head is not None
    log_probs = np.asarray(kx.token_log_probs(model, inputs, following, mask=mask))
    logits = keras.ops.log_softmax(model(inputs))
    expected = np.take_along_axis(np.asarray(logits), following[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(log_probs, np.where(mask, expected, 0.0), rtol=1e-5, atol=1e-6)
    sums = np.asarray(kx.sequence_log_probs(model, inputs, following, mask=mask, normalize=True))
    np.testing.assert_allclose(sums, np.where(mask, expected, 0.0).sum(1) / mask.sum(1), rtol=1e-5)
