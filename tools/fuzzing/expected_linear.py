"""The expected results of a call of a linear kernel: `expected.py`, for logits that are products of matrices."""

from typing import Any

import numpy as np

from tests import oracles
from tests.losses.reference import coefficients
from tools.fuzzing import expected
from tools.fuzzing.calls import Call
from tools.fuzzing.expected import Expected, Limits, finite, precision_of, rounded_to


def _matrices(call, of=""):
    hidden, kernel = call.arrays[of + "hidden"].astype("float64"), call.arrays[of + "kernel"].astype("float64")
    if call.program.get(f"transpose_{of}kernel"):
        kernel = kernel.T
    bias = call.arrays.get(of + "bias")
    return hidden, kernel, np.zeros(kernel.shape[1]) if bias is None else bias.astype("float64")


def _logits(call, of=""):
    """Logits `[N, C]` and the errors of a product of matrices in the accumulator's precision."""
    hidden, kernel, bias = _matrices(call, of)
    eps = precision_of(call)[2]
    with np.errstate(invalid="ignore", over="ignore"):
        size = np.abs(finite(hidden)) @ np.abs(kernel) + np.abs(finite(bias))
        return hidden @ kernel + bias, 2 * eps * size


def _result(call, values, tolerances, d, of_d):
    """With gradients of the logits `d` `[N, C]`, already times the upstream gradient, and their tolerances."""
    hidden, kernel, _ = _matrices(call)
    gradient = precision_of(call)[1]
    used = (d != 0).any(1) | np.isnan(d).any(1)
    hidden = np.where(used[:, None], hidden, 0)
    result = Expected([Limits(v, t) for v, t in zip(values, tolerances, strict=True)])
    with np.errstate(invalid="ignore", over="ignore"):
        exact = {"hidden": d @ kernel.T, "kernel": hidden.T @ d, "bias": d.sum(0)}
        size, h, k = np.abs(finite(d)), np.abs(finite(hidden)), np.abs(finite(kernel))
        of = {"hidden": of_d @ k.T, "kernel": h.T @ of_d, "bias": of_d.sum(0)}
        sizes = {"hidden": size @ k.T, "kernel": h.T @ size, "bias": size.sum(0)}
    for name, value in exact.items():
        if name in call.arrays:
            # Rounding of the products' sums.
            tolerance = of[name] + gradient * sizes[name]
            if name == "kernel" and call.program.get("transpose_kernel"):
                value, tolerance = value.T, tolerance.T
            result.gradients[name] = rounded_to(tolerance, value, call.program.dtype)
    return result


def _weights(call, shape):
    weights = call.arrays.get("token_weights")
    return np.ones(shape) if weights is None else weights.reshape(shape).astype("float64")


def cross_entropy(call: Call) -> Expected:
    """Of `linear_cross_entropy`."""
    names = ("label_smoothing", "focal_gamma", "z_loss", "logit_softcap")
    options = {n: v for n, v in call.program.options if n in names}
    x, errors = _logits(call)
    weights = _weights(call, len(x))
    valid = expected.validity(call)
    active = valid & (weights != 0)
    x = np.where(active[:, None], x, 0.0)
    rows = expected.sparse_rows(call, x, options, errors, counted=weights != 0)
    if rows is None:
        return Expected(raises=True)
    losses, of_loss, gradients, of_gradient = rows
    class_weight = call.arrays.get("class_weight")
    label = np.where(active, call.arrays["labels"].reshape(-1), 0).clip(0, x.shape[1] - 1)
    of_labels = np.ones(len(x)) if class_weight is None else class_weight[label].astype("float64")
    name = call.program.get("reduction", "none")
    return _reduced(call, losses, of_loss, gradients, of_gradient, valid, weights, of_labels, name)


def _reduced(call, losses, of_loss, gradients, of_gradient, valid, weights, of_labels, name):
    c = coefficients(name, valid, weights, of_labels, call.program.get("normalizer"))
    upstream = call.arrays["upstream"]
    products, tolerance = expected._product(c, losses), np.abs(c) * of_loss
    mass = np.abs((weights * valid * of_labels).sum())
    cancelled = 1.0 if not mass else np.abs(weights * valid * of_labels).sum() / mass
    tolerance = tolerance * cancelled
    factor = c * upstream
    if name != "none":
        products, tolerance = products.sum(), tolerance.sum() + precision_of(call)[0] * np.abs(products).sum()
    d = expected._product(factor[:, None], gradients)
    of_d = np.abs(factor)[:, None] * of_gradient * cancelled
    result = _result(call, [np.asarray(products)], [np.asarray(tolerance)], d, of_d)
    result.cases = len(losses) if name == "none" else 1
    return result


def statistics(call: Call) -> Expected:
    """Of `linear_token_statistics`."""
    x, errors = _logits(call)
    valid = expected.validity(call)
    x = np.where(valid[:, None], x, 0.0)
    labels = call.arrays["labels"].reshape(-1)
    bad = valid & ((labels < 0) | (labels >= x.shape[1]))
    if bad.any() and call.program.mode in ("eager", "graph"):
        return Expected(raises=True)
    temperature, cap = call.program.get("temperature", 1.0), call.program.get("logit_softcap")
    labels = np.where(bad | ~valid, 0, labels)
    values, gradients = oracles.token_statistics(labels, x, temperature=temperature, logit_softcap=cap)
    values, gradients = np.where(valid, values, 0), gradients * valid[:, None]
    upstream = call.arrays["upstream"].astype("float64")  # [3, N]
    errors = errors / temperature
    p, delta = expected.conditioned(x, call, errors)
    one_hot = np.eye(x.shape[1])[labels]
    with np.errstate(divide="ignore"):
        spread = 1 + np.where(p > 0, np.abs(np.log(np.where(p > 0, p, 1))), 0)
    loss, gradient, eps = precision_of(call)
    of_p = 2 * p * (delta + (p * delta).sum(1, keepdims=True))
    scaled = np.abs(x) / temperature if cap is None else np.minimum(np.abs(x), cap) / temperature
    tolerances = [
        ((one_hot + p) * delta).sum(1),
        (spread * of_p).sum(1),
        ((p * delta).sum(1) + 4 * eps * scaled.max(1)),
    ]
    tolerances = [t + loss * np.abs(v) for t, v in zip(tolerances, values, strict=False)]
    # How many are ahead of the label depends on the last place of what is near it.
    label_logit, near = np.take_along_axis(x, labels[:, None], 1), 2 * (errors * temperature).max(1, keepdims=True)
    ties = (np.abs(x - label_logit) <= near).sum(1) - 1
    are_exact = np.array_equal(np.round(x), x)
    if cap is not None:
        ties = ties + (np.abs(x) > 0.1 * cap).sum(1)
    tolerances.append(np.where(are_exact & (cap is None), 0.0, ties))
    factor = np.where(upstream == 0, 0, upstream)[:, :, None]
    d = expected._product(factor, gradients).sum(0)
    sizes = np.abs(upstream)[:, :, None] * np.array([of_p + one_hot * 0, spread * of_p * 2, of_p])
    # The last term is the rounding of the oracle.
    of_d = (
        sizes.sum(0) / temperature
        + 1e-14 * np.abs(upstream).sum(0)[:, None]
        + 2 * gradient * np.abs(factor * gradients).max(2, keepdims=True).sum(0)
    )
    dead = bad & (upstream != 0).any(0)
    d[dead] = np.nan
    values = [np.where(bad, np.nan, v) for v in values]
    result = _result(call, values, tolerances, d, of_d * valid[:, None])
    result.cases = len(x)
    return result


def _of_divergence(call, losses, gradients, errors, q):
    options = dict(call.program.options)
    t = options.get("temperature", 1.0)
    loss, gradient, eps = precision_of(call)
    # The terms of a divergence near 0 are differences of probabilities that are rounded.
    error = errors.max(1) / t
    of_loss = loss * np.abs(losses) + t**2 * (4 * error * np.sqrt(np.abs(losses) / t**2) + 8 * eps * error)
    largest = np.abs(gradients).max(1, keepdims=True)
    apart = (1 + np.abs(losses / t**2))[:, None]
    of_probabilities = 4 * error[:, None] * np.maximum(q, np.sqrt(q) * 1e-2) * apart
    # The last term is the rounding of the oracle.
    of_gradient = gradient * largest + t * (of_probabilities + 1e-15 * apart)
    valid = call.arrays.get("mask", np.ones(len(losses), bool)).reshape(-1)
    weights = _weights(call, len(losses))
    name = options.get("reduction", "none")
    return _reduced(call, losses, of_loss, gradients, of_gradient, valid, weights, np.ones(len(losses)), name)


def _probabilities(x: np.ndarray, temperature: float) -> Any:
    return np.exp([oracles.log_softmax(row) for row in x / temperature]).reshape(x.shape)


def distillation(call: Call) -> Expected:
    """Of `linear_distillation`."""
    options = dict(call.program.options)
    x, errors = _logits(call)
    teacher, of_teacher = _logits(call, "teacher_")
    valid = call.arrays.get("mask", np.ones(len(x), bool)).reshape(-1) & (_weights(call, len(x)) != 0)
    x, teacher = (np.where(valid[:, None], a, 0.0) for a in (x, teacher))
    cap, of = options.get("logit_softcap"), ("divergence", "temperature", "beta")
    losses, gradients = oracles.divergence(x, teacher, softcap=cap, **{n: v for n, v in options.items() if n in of})
    cap_error = 0 if cap is None else 8 * precision_of(call)[2] * cap
    eps = precision_of(call)[2]
    errors = errors + of_teacher + cap_error + 2 * eps * (np.abs(x) + np.abs(teacher))
    t = options.get("temperature", 1.0)
    return _of_divergence(call, losses, gradients, errors, _probabilities(x, t) + _probabilities(teacher, t))


def top_k(call: Call) -> Expected:
    """Of `linear_top_k_distillation`."""
    options = dict(call.program.options)
    x, errors = _logits(call)
    valid = call.arrays.get("mask", np.ones(len(x), bool)).reshape(-1) & (_weights(call, len(x)) != 0)
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
