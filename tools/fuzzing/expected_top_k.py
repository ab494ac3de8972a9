"""The expected results of a call of `linear_top_k_distillation`, and of `linear_top_k`."""

from dataclasses import replace

import numpy as np

from tests import oracles
from tools.fuzzing.calls import Call, Program
from tools.fuzzing.expected import Expected, Limits, precision_of
from tools.fuzzing.expected_linear import _logits, _of_divergence, _probabilities, _values_of_statistics, _weights


def k_of(program: Program) -> int:
    """How many classes `linear_top_k` is asked for: no more than there are."""
    return min(program.get("k", 2), program.shape[-1])


def classes(call: Call) -> Expected:
    """Of `linear_top_k`: log-probabilities, and classes where no other may have their place."""
    x, errors = _logits(call)
    valid = call.arrays.get("mask", np.ones(len(x), bool)).reshape(-1)
    x = np.where(valid[:, None], x, 0.0)
    ids = np.argsort(-x, axis=1, kind="stable")[:, : k_of(call.program)]
    log_probs, of_log_probs, of_ids = (np.zeros(ids.shape) for _ in range(3))
    for i, labels in enumerate(ids.T):
        (log_probs[:, i], *_), (of_log_probs[:, i], *_, ties), *_ = _values_of_statistics(call, x, errors, labels)
        of_ids[:, i] = np.where(ties > 0, np.inf, 0.0)
    of_ids, of_log_probs = (np.where(valid[:, None], one, 0.0) for one in (of_ids, of_log_probs))
    ids, log_probs = np.where(valid[:, None], ids, -1), np.where(valid[:, None], log_probs, 0.0)
    return Expected([Limits(ids, of_ids), Limits(log_probs, of_log_probs)], cases=len(x))


def distillation(call: Call) -> Expected:
    """Of `linear_top_k_distillation`."""
    options = dict(call.program.options)
    x, errors = _logits(call)
    has_class = (call.arrays["ids"] >= 0).any(axis=1)
    mask = call.arrays.get("mask", np.ones(len(x), bool)).reshape(-1) & has_class
    call = replace(call, arrays=call.arrays | {"mask": mask})
    valid = mask & (_weights(call, len(x)) != 0)
    x = np.where(valid[:, None], x, 0.0)
    ids, log_probs = call.arrays["ids"], call.arrays["log_probs"].astype("float64")
    t, cap = options.get("temperature", 1.0), options.get("logit_softcap")
    losses, gradients = oracles.top_k_divergence(x, ids, log_probs, temperature=t, softcap=cap)
    eps = precision_of(call)[2]
    errors = errors + (0 if cap is None else 8 * eps * cap) + 2 * eps * np.abs(x)
    with np.errstate(over="ignore"):
        p = np.where((ids >= 0) & (ids < x.shape[1]), np.exp(log_probs), 0)
    # The terms have either sign.
    size = t**2 * (p * (np.abs(log_probs) + np.abs(x).max(1, keepdims=True) / t + 4)).sum(1)
    q = _probabilities(x, t) * p.sum(1, keepdims=True)
    for row, classes, share in zip(q, ids, p, strict=True):
        np.add.at(row, np.where(share > 0, classes, 0), share)
    result = _of_divergence(call, losses, gradients, errors, q)
    weights = np.abs(_weights(call, len(x))) * valid
    more = precision_of(call)[0] * size * weights
    if options.get("reduction", "none") == "none":
        result.values[0].tolerance = result.values[0].tolerance + more
    else:
        total = max(weights.sum(), 1e-30) if options["reduction"] == "token_mean" else 1.0
        result.values[0].tolerance = result.values[0].tolerance + more.sum() / total
    return result
