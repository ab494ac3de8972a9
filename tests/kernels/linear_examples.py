"""Options, inputs and shorthands for the tests of the linear kernel."""

import numpy as np
from keras import ops

from keras_xent.kernels import linear_cross_entropy
from tests import oracles
from tests.backend import DTYPES, MODES, tensor, to_numpy, with_gradients
from tests.internals import set_sizes

TOKENS, FEATURES, CLASSES = 101, 7, 37
WIDEST = DTYPES[0]
NAN = float("nan")
WEIGHTS = np.random.default_rng(9).uniform(0.2, 2, CLASSES).tolist()
OPTIONS = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.1},
    "weights": {"class_weight": WEIGHTS},
    "focal": {"focal_gamma": 1.5},
    "z-loss": {"z_loss": 0.1},
    "softcap": {"logit_softcap": 3.0},
    "all": {"label_smoothing": 0.1, "class_weight": WEIGHTS, "focal_gamma": 1.5, "z_loss": 0.01, "logit_softcap": 5.0},
}


def set_small_chunks(monkeypatch):
    """Chunks of at most 8 tokens made of blocks of 2; gradients in strips of 10 classes: nothing divides anything."""
    set_sizes(
        monkeypatch.setattr,
        fewest_rows=1,
        chunk_bytes=4 * CLASSES * 8,
        strip_bytes=4 * FEATURES * 10,
        block_bytes=4 * CLASSES * 2,
    )


def example(seed=0, tokens=TOKENS, features=FEATURES, classes=CLASSES):
    rng = np.random.default_rng(seed)
    hidden, kernel = rng.standard_normal((tokens, features)), rng.standard_normal((features, classes))
    return hidden, kernel, rng.standard_normal(classes), rng.integers(0, classes, tokens)


def cross_entropy(labels, **options):
    """The kernel as a function of its float inputs."""
    return lambda hidden, kernel, bias: linear_cross_entropy(hidden, kernel, labels, bias, **options)


def run(function, inputs, upstream=None, mode="eager", dtype=None):
    """`function(*inputs)`, and the gradient for each input of its product with `upstream`."""
    inputs = tuple(tensor(x, dtype or WIDEST) for x in inputs)

    def total(*inputs):
        value = function(*inputs)
        return ops.sum(value if upstream is None else value * ops.cast(upstream, value.dtype)), value

    (_, value), gradients = MODES[mode](with_gradients(total))(*inputs)
    return to_numpy(value), [to_numpy(g) for g in gradients]


# Of the largest entry: a few roundings of sums of a hundred terms.
TOLERANCE = 1e-13 if WIDEST == "float64" else 2e-6


def assert_near(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=TOLERANCE * max(1e-30, np.abs(other).max(initial=0)))


def oracle(hidden, kernel, bias, labels, share, **options):
    """Losses, and the gradients of `sum(share * losses)` for hidden states, kernel and bias."""
    losses, of_logits = oracles.sparse(labels, hidden @ kernel + bias, **options)
    of_logits = of_logits * share[:, None]
    return losses, [of_logits @ kernel.T, hidden.T @ of_logits, of_logits.sum(0)]
