"""Masks line up with labels from the left, as weights do: a mask of examples is none of time steps."""

import numpy as np
import pytest

import keras_xent as kx
from tests.backend import TWO_MODES, tensor, to_numpy, value_and_gradient
from tests.tiers import fast_for

SIZE, FEATURES, CLASSES = 4, 3, 7
RNG = np.random.default_rng(6)
# As many examples as time steps.
HIDDEN = RNG.standard_normal((SIZE, SIZE, FEATURES)).astype("float32")
KERNEL = RNG.standard_normal((FEATURES, CLASSES)).astype("float32")
LABELS = RNG.integers(0, CLASSES, (SIZE, SIZE))
MASK = np.array([True, False, True, False])


def pairs(hidden, mask):
    """Groups of one sequence, whose losses are their log-probabilities."""
    mask = mask if mask.ndim == 1 else mask[:, None]
    return kx.kernels.linear_sequence_loss(
        hidden[:, None], KERNEL, LABELS[:, None], mask=mask, loss=lambda one: one, reduction="none"
    )


KERNELS = {
    "sparse": lambda x, mask: kx.kernels.sparse_softmax_cross_entropy(LABELS, x @ KERNEL, mask=mask),
    "dense": lambda x, mask: kx.kernels.softmax_cross_entropy(np.eye(CLASSES)[LABELS], x @ KERNEL, mask=mask),
    "linear": lambda x, mask: kx.kernels.linear_cross_entropy(x, KERNEL, LABELS, mask=mask),
    "reduced": lambda x, mask: kx.kernels.linear_cross_entropy(x, KERNEL, LABELS, mask=mask, reduction="token_mean"),
    "statistics": lambda x, mask: kx.kernels.linear_token_statistics(x, KERNEL, LABELS, mask=mask).log_prob,
    "sequences": pairs,
}


@fast_for("*-eager-statistics", "*-eager-dense")
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("mode", TWO_MODES)
@pytest.mark.parametrize("shape", [(SIZE,), (SIZE, 1)])
def test_a_mask_of_examples_masks_all_their_tokens(shape, mode, name):
    found = value_and_gradient(lambda x: KERNELS[name](x, MASK.reshape(shape)), tensor(HIDDEN), mode=mode)
    whole = np.broadcast_to(MASK[:, None], (SIZE, SIZE))
    expected = value_and_gradient(lambda x: KERNELS[name](x, whole), tensor(HIDDEN), mode=mode)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)
    assert not found[1][~MASK].any() and found[1][MASK].any()


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("shape", [(1, SIZE), (SIZE, SIZE, 1)])
def test_masks_of_time_steps(shape, name):
    whole = np.tile(MASK, (SIZE, 1))
    found = to_numpy(KERNELS[name](tensor(HIDDEN), whole[: shape[0]].reshape(shape)))
    expected = to_numpy(KERNELS[name](tensor(HIDDEN), whole))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("name", KERNELS)
def test_a_mask_may_have_a_class_axis_of_size_1(name):
    mask = RNG.random((SIZE, SIZE)) < 0.5
    found = to_numpy(KERNELS[name](tensor(HIDDEN), mask[..., None]))
    np.testing.assert_array_equal(found, to_numpy(KERNELS[name](tensor(HIDDEN), mask)))


@pytest.mark.parametrize("name", KERNELS)
def test_a_mask_that_does_not_fit_is_refused(name):
    with pytest.raises(ValueError, match="`mask` must line up from the left with the losses"):
        KERNELS[name](tensor(HIDDEN), np.ones(SIZE + 1, bool))
