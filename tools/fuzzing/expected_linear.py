"""The expected results of a call of a linear kernel: `expected.py`, for logits that are products of matrices."""

from typing import Any

import numpy as np

from tests import oracles
from tests.internals import on_accelerator
from tests.losses.reference import coefficients
from tools.fuzzing import expected
from tools.fuzzing.calls import Call
from tools.fuzzing.expected import ROUNDING, Expected, Limits, finite, precision_of, rounded_to


def _matrices(call, of=""):
    hidden, kernel = call.arrays[of + "hidden"].astype("float64"), call.arrays[of + "kernel"].astype("float64")
    hidden = hidden.reshape(-1, hidden.shape[-1])
    if call.program.get(f"transpose_{of}kernel"):
        kernel = kernel.T
    bias = call.arrays.get(of + "bias")
    return hidden, kernel, np.zeros(kernel.shape[1]) if bias is None else bias.astype("float64")


def _factors(call):
    """The two factors `[D, R]` and `[R, C]` of what is added to the kernel; None where nothing is."""
    if "first" not in call.arrays:
        return None
    first, second = (call.arrays[name].astype("float64") for name in ("first", "second"))
    return (second.T, first.T) if call.program.get("transpose_kernel") else (first, second)


def _logits(call, of=""):
    """Logits `[N, C]` and the errors of a product of matrices in the accumulator's precision."""
    hidden, kernel, bias = _matrices(call, of)
    eps = precision_of(call)[2]
    with np.errstate(invalid="ignore", over="ignore"):
        size = np.abs(finite(hidden)) @ np.abs(kernel) + np.abs(finite(bias))
        logits, errors = hidden @ kernel + bias, 2 * eps * size
        if of == "" and (factors := _factors(call)) is not None:
            outer, inner = factors
            logits = logits + hidden @ outer @ inner
            size = np.abs(finite(hidden)) @ np.abs(outer) @ np.abs(inner)
            # The first product is rounded to the dtype of the hidden states, as that of Keras is.
            rounding = ROUNDING.get(call.program.dtype, (0.0,))[0]
            errors = errors + 4 * eps * size + rounding * np.abs(finite(hidden @ outer)) @ np.abs(inner)
        return logits, errors


def _result(call, values, tolerances, d, of_d):
    """With gradients of the logits `d` `[N, C]`, already times the upstream gradient, and their tolerances."""
    hidden, kernel, _ = _matrices(call)
    gradient = precision_of(call)[1]
    used = (d != 0).any(1) | np.isnan(d).any(1) | (of_d > 0).any(1)
    hidden = np.where(used[:, None], hidden, 0)
    result = Expected([Limits(v, t) for v, t in zip(values, tolerances, strict=True)])
    with np.errstate(invalid="ignore", over="ignore"):
        size, h, k = np.abs(finite(d)), np.abs(finite(hidden)), np.abs(finite(kernel))
        exact = {"hidden": d @ kernel.T, "kernel": hidden.T @ d, "bias": d.sum(0)}
        # Beside the errors of `d` stands the rounding of the products' sums.
        of_d = of_d + gradient * size
        if on_accelerator():
            # There the gradient of the logits is rounded to the dtype of the kernel before it is multiplied.
            relative, smallest = ROUNDING.get(call.program.dtype, (0.0, 0.0))
            of_d = of_d + relative * size + smallest * (size > 0)
        tolerances = {"hidden": of_d @ k.T, "kernel": h.T @ of_d, "bias": of_d.sum(0)}
        if (factors := _factors(call)) is not None:
            outer, inner = factors
            # What is rounded on the way: the projected states, and the gradient for them.
            rounding = ROUNDING.get(call.program.dtype, (0.0,))[0]
            of_d = of_d + rounding * size
            parts = exact["hidden"], d @ inner.T @ outer.T
            exact["hidden"] = sum(parts)
            exact |= {"first": hidden.T @ (d @ inner.T), "second": (hidden @ outer).T @ d}
            a, b = np.abs(outer), np.abs(inner)
            # Each of the two is a gradient of the hidden states, in their dtype.
            of_parts = rounding * sum(map(np.abs, parts))
            tolerances["hidden"] = tolerances["hidden"] + 2 * of_d @ b.T @ a.T + of_parts
            tolerances |= {"first": 2 * h.T @ (of_d @ b.T), "second": 2 * (h @ a).T @ of_d}
            if call.program.get("transpose_kernel"):
                for arrays in (exact, tolerances):
                    arrays["first"], arrays["second"] = arrays["second"].T, arrays["first"].T
    for name, value in exact.items():
        if name in call.arrays:
            tolerance = tolerances[name]
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
    label = np.where(active, call.arrays["labels"].reshape(-1).astype("int64"), 0).clip(0, x.shape[1] - 1)
    of_labels = np.ones(len(x)) if class_weight is None else class_weight[label].astype("float64")
    name = call.program.get("reduction", "none")
    result = _reduced(call, losses, of_loss, gradients, of_gradient, valid, weights, of_labels, name)
    if call.program.get("return_statistics"):
        result.values += _statistics_of_loss(call, x, errors, label, active)
    return result


def soft_targets(call: Call) -> Expected:
    """Of `linear_softmax_cross_entropy`."""
    names = ("label_smoothing", "focal_gamma", "z_loss", "logit_softcap")
    options = {n: v for n, v in call.program.options if n in names}
    x, errors = _logits(call)
    weights = _weights(call, len(x))
    valid = call.arrays.get("mask", np.ones(len(x), bool)).reshape(-1)
    x = np.where((valid & (weights != 0))[:, None], x, 0.0)
    q, w = call.arrays["targets"].astype("float64"), call.arrays.get("class_weight")
    losses, gradients, _ = oracles.softmax(q, x, class_weight=w, **options)
    smoothing = options.get("label_smoothing", 0.0)
    a = (q * (1 - smoothing) + smoothing / x.shape[1]) * (1.0 if w is None else w)
    of_loss, of_gradient = expected.limits_of_rows(call, losses, gradients, x, a, errors)
    name = call.program.get("reduction", "none")
    of_labels = (q if w is None else q * w).sum(1) if w is not None or name == "token_mean" else np.ones(len(x))
    return _reduced(call, losses, of_loss, gradients, of_gradient, valid, weights, of_labels, name)


def _statistics_of_loss(call, x, errors, labels, active):
    """The fields of `LossStatistics`: nll, rank, entropy, logsumexp and confidence; of other tokens anything."""
    values, tolerances, p, of_p = _values_of_statistics(call, x, errors, labels)
    nll, entropy, lse, rank = -values[0], values[1], values[2], values[3]
    of_nll, of_entropy, of_lse, of_rank = tolerances
    found = [(nll, of_nll), (rank, of_rank), (entropy, of_entropy), (lse, of_lse)]
    found.append((p.max(1, initial=0.0), of_p.max(1, initial=0.0) + precision_of(call)[0] * p.max(1, initial=0.0)))
    is_class = (call.arrays["labels"] >= 0) & (call.arrays["labels"] < x.shape[1])
    return [Limits(v, np.where(active & is_class, t, np.inf)) for v, t in found]


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
    labels = call.arrays["labels"].reshape(-1).astype("int64")
    bad = valid & ((labels < 0) | (labels >= x.shape[1]))
    if bad.any() and call.program.mode in ("eager", "graph"):
        return Expected(raises=True)
    temperature, cap = call.program.get("temperature", 1.0), call.program.get("logit_softcap")
    labels = np.where(bad | ~valid, 0, labels)
    _, gradients = oracles.token_statistics(labels, x, temperature=temperature, logit_softcap=cap)
    gradients = gradients * valid[:, None]
    upstream = call.arrays["upstream"].astype("float64")  # [3, N]
    values, tolerances, p, of_p = _values_of_statistics(call, x, errors, labels)
    values, gradient = np.where(valid, values, 0), precision_of(call)[1]
    spread = 1 + np.abs(np.log(np.where(p > 0, p, 1)))
    factor = np.where(upstream == 0, 0, upstream)[:, :, None]
    d = expected._product(factor, gradients).sum(0)
    sizes = np.abs(upstream)[:, :, None] * np.array([of_p, spread * of_p * 2, of_p])
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


def _values_of_statistics(call, x, errors, labels):
    """Log-probability, entropy, log-sum-exp and rank `[4, N]`, and probabilities; each with tolerances."""
    temperature, cap = call.program.get("temperature", 1.0), call.program.get("logit_softcap")
    values, _ = oracles.token_statistics(labels, x, temperature=temperature, logit_softcap=cap)
    p, delta = expected.conditioned(x, call, errors / temperature)
    one_hot = np.eye(x.shape[1])[labels]
    spread = 1 + np.abs(np.log(np.where(p > 0, p, 1)))
    loss, _, eps = precision_of(call)
    of_p = 2 * p * (delta + (p * delta).sum(1, keepdims=True))
    sizes = np.abs(finite(x)) / temperature
    scaled = sizes if cap is None else np.minimum(sizes, cap / temperature)
    tolerances = [
        ((one_hot + p) * delta).sum(1),
        (spread * of_p).sum(1),
        ((p * delta).sum(1) + 4 * eps * scaled.max(1, initial=0.0)),
    ]
    tolerances = [t + loss * np.abs(finite(v)) for t, v in zip(tolerances, values, strict=False)]
    # How many are ahead of the label depends on the last place of what is near it.
    label_logit, near = np.take_along_axis(x, labels[:, None], 1), 2 * errors.max(1, keepdims=True, initial=0.0)
    with np.errstate(invalid="ignore"):
        ties = ((np.abs(x - label_logit) <= near) | (x == label_logit)).sum(1) - 1
    are_exact = np.array_equal(np.round(x), x) and (_factors(call) is None or "16" not in call.program.dtype)
    if cap is not None:
        ties = ties + (np.abs(x) > 0.1 * cap).sum(1)
    tolerances.append(np.where(are_exact & (cap is None), 0.0, ties))
    return values, tolerances, p, of_p


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
    # The last terms are the rounding of two probabilities whose difference it is, and that of the oracle.
    of_gradient = gradient * largest + t * (of_probabilities + 2 * eps * q + 1e-15 * apart)
    if cap := options.get("logit_softcap"):
        # The slope of the cap is off by up to twice this, and what it is multiplied by too.
        of_gradient = of_gradient + 4 * errors / cap * np.abs(gradients)
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
