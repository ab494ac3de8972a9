"""Losses of groups of sequences under models: equal to those of the log-probabilities of the sequences."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_xent as kx
from tests.backend import MODES, every_mode, to_numpy
from tests.test_log_probs import LABELS, MASK, TOKENS, VOCABULARY, WIDTH, built, values_and_gradients
from tests.tiers import whole

PAIRS = np.stack([TOKENS, TOKENS[::-1]], axis=1)  # [G, 2, T]
PAIR_LABELS = np.stack([LABELS, (LABELS + 7) % VOCABULARY], axis=1)
PAIR_MASK = np.stack([MASK, MASK[::-1]], axis=1)
REFERENCES = tuple(np.random.default_rng(5).standard_normal((2, 4)).astype("float32"))


OPTIONS = {
    "plain": {},
    "mask": {"mask": PAIR_MASK, "temperature": 1.7},
    "normalize": {"mask": PAIR_MASK, "normalize": True, "reduction": "sum"},
}


@every_mode
@pytest.mark.parametrize(
    "name, case",
    [
        ("LogitsDense", "plain"),
        ("LogitsDense", "normalize"),
        ("LoRA", "mask"),
        ("softmax layer", "normalize"),
        pytest.param("TiedLogits", "mask", marks=whole),
        pytest.param("plain Dense", "mask", marks=whole),
        pytest.param("subclassed, scaled", "mask", marks=whole),
    ],
)
def test_a_loss_of_pairs_is_that_of_their_log_probabilities(name, case, mode):
    """Value, log-probabilities and gradients, where the gradient is formed on the way and where it is not."""
    model, options = built(name), OPTIONS[case]
    given = {key: value for key, value in options.items() if key not in ("mask", "reduction")}
    padded = np.where(PAIR_MASK, PAIRS, 0)  # what an embedding with `mask_zero` masks

    def mine():
        arguments = {"loss": kx.preference.dpo, "arrays": REFERENCES, "return_log_probs": True}
        return kx.sequence_loss(model, padded, PAIR_LABELS, **arguments, **options)

    def plain():
        mask = options.get("mask")
        log_probs = [
            kx.sequence_log_probs(
                model, padded[:, i], PAIR_LABELS[:, i], mask=None if mask is None else mask[:, i], **given
            )
            for i in (0, 1)
        ]
        losses = kx.preference.dpo(*log_probs, *REFERENCES)
        return (ops.sum if "reduction" in options else ops.mean)(losses), ops.stack(log_probs, axis=1)

    (loss, log_probs), slopes = values_and_gradients(model, mine, MODES[mode])
    (expected, expected_log_probs), expected_slopes = values_and_gradients(model, plain, MODES[mode])
    np.testing.assert_allclose(loss, expected, rtol=2e-6)
    np.testing.assert_allclose(log_probs, expected_log_probs, rtol=2e-6)
    for one, other in zip(slopes, expected_slopes, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)
        assert np.abs(one).max() > 0


def test_a_loss_of_pairs_takes_a_structure_of_inputs():
    tokens, other = (
        keras.Input((None,), dtype="int32", name="tokens"),
        keras.Input((None,), dtype="int32", name="other"),
    )
    embedding = keras.layers.Embedding(VOCABULARY, WIDTH)
    model = keras.Model([tokens, other], kx.layers.LogitsDense(VOCABULARY)(embedding(tokens) + embedding(other)))
    options = {"loss": kx.preference.simpo, "reduction": "none"}
    both = kx.sequence_loss(model, [PAIRS, PAIRS[::-1]], PAIR_LABELS, **options)
    log_probs = (kx.sequence_log_probs(model, [PAIRS[:, i], PAIRS[::-1, i]], PAIR_LABELS[:, i]) for i in (0, 1))
    np.testing.assert_allclose(to_numpy(both), to_numpy(kx.preference.simpo(*log_probs)), rtol=1e-5)


def test_wrong_shapes_of_groups_are_named():
    model = built("LogitsDense")
    with pytest.raises(ValueError, match=r"`labels` must have shape \[G, S, T\].*Received: labels of shape \(4, 5\)"):
        kx.sequence_loss(model, TOKENS, LABELS, loss=kx.preference.simpo)
    with pytest.raises(ValueError, match=r"`x` must have shape \[G, S, ...\].*Received: shape \(4, 5\)"):
        kx.sequence_loss(model, TOKENS, PAIR_LABELS, loss=kx.preference.simpo)
    with pytest.raises(ValueError, match=r"`mask` must have shape \[G, S, ...\].*Received: shape \(4, 5\)"):
        kx.sequence_loss(model, PAIRS, PAIR_LABELS, mask=MASK, loss=kx.preference.simpo)
    with pytest.raises(ValueError, match="`labels` must have the shape of `logits` without its class axis"):
        kx.sequence_loss(model, PAIRS, PAIR_LABELS[..., 1:], loss=kx.preference.simpo)


@pytest.mark.parametrize("name", ["LogitsDense", "softmax layer"])
def test_a_single_array_is_not_taken_apart(name):
    """Of two groups it would be two numbers, and each would be broadcast over the groups."""
    with pytest.raises(ValueError, match="`arrays` must be a tuple, with an array for each argument of `loss`"):
        kx.sequence_loss(
            built(name), PAIRS, PAIR_LABELS, loss=lambda c, r, *arrays: c - r - sum(arrays), arrays=REFERENCES[0]
        )


@pytest.mark.parametrize("name", ["LogitsDense", "softmax layer"])
def test_a_loss_that_takes_another_number_of_arrays_is_named(name):
    with pytest.raises(ValueError, match="`loss` must take .* Received: 2 sequences and 0 arrays for `dpo`, missing"):
        kx.sequence_loss(built(name), PAIRS, PAIR_LABELS, loss=kx.preference.dpo)
