"""The expected results of a call of `linear_sequence_loss`: a loss of the log-probabilities of pairs of sequences."""

import functools
from typing import Any

import numpy as np

from keras_xent import preference
from tests import oracles
from tests.losses.reference import coefficients
from tools.fuzzing import expected
from tools.fuzzing.calls import Call
from tools.fuzzing.expected import Expected, Limits, precision_of
from tools.fuzzing.expected_linear import _logits, _result, _values_of_statistics

# By the name of the option.
LOSSES = {
    "dpo": functools.partial(preference.dpo, beta=0.5),
    "ipo": functools.partial(preference.ipo, beta=0.5),
}


def _of_margin(name, margin):
    """Losses, their slopes for the margin, and how far a slope moves with it at most."""
    if name == "ipo":
        return (margin - 1.0) ** 2, 2.0 * (margin - 1.0), 2.0
    with np.errstate(over="ignore"):
        return np.logaddexp(0.0, -0.5 * margin), -0.5 / (1.0 + np.exp(0.5 * margin)), 0.0625


def sequence_loss(call: Call) -> Expected:
    """Of `linear_sequence_loss`."""
    options = dict(call.program.options)
    x, errors = _logits(call)
    groups, count, length = call.arrays["labels"].shape
    valid = expected.validity(call)
    x = np.where(valid[:, None], x, 0.0)
    labels = np.where(valid, call.arrays["labels"].reshape(-1), 0).astype("int64")
    temperature, cap = options.get("temperature", 1.0), options.get("logit_softcap")
    _, gradients = oracles.token_statistics(labels, x, temperature=temperature, logit_softcap=cap)
    values, tolerances, _, of_p = _values_of_statistics(call, x, errors, labels)
    keep = valid.reshape(groups, count, length)
    numbers = np.maximum(keep.sum(2), 1.0) if options.get("normalize") else np.ones((groups, count))

    def sums(of_tokens: Any) -> np.ndarray:
        return np.where(keep, of_tokens.reshape(keep.shape), 0.0).sum(2) / numbers

    loss, gradient, eps = precision_of(call)
    log_probs, references = sums(values[0]), call.arrays["reference"].astype("float64")
    of_margin = (sums(tolerances[0]) + eps * (length * sums(np.abs(values[0])) + np.abs(references))).sum(1)
    difference = log_probs - references
    losses, slopes, curvature = _of_margin(options.get("loss", "dpo"), difference[:, 0] - difference[:, 1])
    of_slopes = curvature * of_margin + gradient * np.abs(slopes)
    of_losses = np.abs(slopes) * of_margin + curvature * of_margin**2 + loss * np.abs(losses)
    # To the tokens: the slope of the group, of either sign, divided by the number of tokens where the sum was.
    name = options.get("reduction", "mean")
    share = coefficients(name, np.ones(groups))
    factor = (share * call.arrays["upstream"])[:, None, None] * np.array([1.0, -1.0])[:, None] / numbers[..., None]
    factor = np.where(keep, factor, 0.0)
    of_rows, of_error = ((factor * one[:, None, None]).reshape(-1, 1) for one in (slopes, of_slopes))
    d = expected._product(of_rows, gradients[0])
    largest = np.abs(gradients[0]).max(1, keepdims=True, initial=0.0)
    of_d = np.abs(of_rows) * (of_p / temperature + gradient * largest) + np.abs(of_error * gradients[0])
    products, tolerance = share * losses, np.abs(share) * of_losses
    if name != "none":
        products, tolerance = products.sum(), tolerance.sum() + loss * np.abs(products).sum()
    result = _result(call, [np.asarray(products)], [np.asarray(tolerance)], d, of_d)
    limits, shape = result.gradients["hidden"], call.arrays["hidden"].shape
    result.gradients["hidden"] = Limits(limits.value.reshape(shape), limits.tolerance.reshape(shape))
    result.cases = groups
    return result
