"""Linear kernels of a batch that is masked whole: gradients are exactly 0, whatever the head and its inputs hold.

A batch of one chunk is computed all the same, where one of several chunks is left out.
"""

import numpy as np
import pytest
from keras import ops

from keras_xent import kernels
from tests.backend import TWO_MODES
from tests.kernels.linear_examples import NAN, example, run
from tests.tiers import fast_for

TOKENS, CLASSES = 6, 11
HIDDEN, KERNEL, BIAS, LABELS = example(tokens=TOKENS, classes=CLASSES)
MASK = np.zeros(TOKENS, bool)
TARGETS = np.full((TOKENS, CLASSES), 1 / CLASSES)


def statistics(*inputs, **options):
    found = kernels.linear_token_statistics(*inputs[:2], LABELS, inputs[2], **options)
    return found.log_prob + found.entropy + found.logsumexp


def on_labels(**more):
    return lambda hidden, kernel, bias, **options: kernels.linear_cross_entropy(
        hidden, kernel, LABELS, bias, **options, **more
    )


KERNELS = {
    "loss": on_labels(),
    "sum of losses": on_labels(reduction="sum"),
    "weighted and focal": on_labels(focal_gamma=2.0, class_weight=np.ones(CLASSES)),
    "smoothed": on_labels(label_smoothing=0.1, reduction="sum"),
    "soft targets": lambda hidden, kernel, bias, **options: kernels.linear_softmax_cross_entropy(
        hidden, kernel, TARGETS, bias, **options
    ),
    "statistics": statistics,
    "distillation": lambda hidden, kernel, bias, **options: kernels.linear_distillation(
        hidden, kernel, HIDDEN, KERNEL, bias, **options
    ),
    "top-k": lambda hidden, kernel, bias, **options: kernels.linear_top_k_distillation(
        hidden, kernel, LABELS[:, None], np.full((TOKENS, 1), -1.0), bias, **options
    ),
}


@fast_for("loss-bad1", "statistics-bad1", "top-k-bad1")
@pytest.mark.parametrize("bad", [(), (0, 1, 2, 4)])
@pytest.mark.parametrize("name", KERNELS)
def test_gradients_are_zero_beside_a_head_of_nan_and_infinity(name, bad):
    inputs = [HIDDEN.copy(), KERNEL.copy(), BIAS.copy(), np.ones((HIDDEN.shape[1], 2)), np.ones((2, CLASSES))]
    for place in bad:
        inputs[place].flat[3], inputs[place].flat[5] = NAN, float("inf")

    def values(hidden, kernel, bias, first, second):
        return ops.sum(KERNELS[name](hidden, kernel, bias, mask=MASK, low_rank=(first, second)))

    value, gradients = run(values, inputs, mode=TWO_MODES[1])
    assert value == 0
    assert all((gradient == 0).all() for gradient in gradients)
