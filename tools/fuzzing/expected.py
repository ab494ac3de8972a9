"""The expected results of a call, by the oracle of the tests, and their tolerances.

The limits are those of docs/numerics.md: 2e-6 of a loss, 1e-6 of the largest entry of a row's gradient (1e-12 and 1e-13
in float64), and half of the last place where a gradient is rounded to 16 bits. Beside these stands what any computation
in the accumulator's precision loses: `x_c - max x` is rounded, the soft cap is, and so are the products of a matmul.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tests import oracles
from tests.losses.reference import coefficients
from tools.fuzzing.calls import Call

# Relative errors of a loss, of a gradient, and of one operation, by whether sums are float64.
PRECISION = {False: (2e-6, 1e-6, 2.0**-23), True: (1e-12, 1e-13, 2.0**-52)}
# Half of the last place, and half of the smallest number.
ROUNDING = {"bfloat16": (2.0**-8, 2.0**-134), "float16": (2.0**-11, 2.0**-25)}


@dataclass
class Limits:
    """An array, and how far from it a result may be."""

    value: np.ndarray
    tolerance: np.ndarray


@dataclass
class Expected:
    """The expected results of a call: values, and gradients by the name of the array; or an error."""

    values: list[Limits] = field(default_factory=list)
    gradients: dict[str, Limits] = field(default_factory=dict)
    raises: bool = False
    cases: int = 1


def precision_of(call: Call) -> tuple[float, float, float]:
    """The relative errors of the call's dtype."""
    return PRECISION[call.program.dtype == "float64"]


def _product(weight: np.ndarray, value: np.ndarray) -> np.ndarray:
    """0 where the weight is."""
    with np.errstate(invalid="ignore", over="ignore"):
        return np.where(weight == 0, 0.0, weight * value)


def conditioned(x: np.ndarray, call: Call, delta: Any = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities `[N, C]`, and the errors `[N, C]` of `x_c - max x`; `delta` are those of the logits themselves."""
    eps = precision_of(call)[2]
    temperature = call.program.get("temperature", 1.0)
    raw, cap = x, call.program.get("logit_softcap")
    if cap is not None:
        x = cap * np.tanh(x / cap)
    x = x / temperature
    with np.errstate(invalid="ignore"):
        apart = np.abs(x - x.max(axis=1, keepdims=True))
    error = eps * np.where(np.isfinite(apart), apart, 0.0)
    if cap is not None:
        error = error + 4 * eps * np.minimum(cap, np.where(np.isnan(raw), 0, np.abs(raw))).max(1, keepdims=True)
    return np.exp([oracles.log_softmax(row) for row in x]).reshape(x.shape), error + delta


def finite(array: Any) -> np.ndarray:
    """The array with 0 in place of what is not finite."""
    return np.where(np.isfinite(array), array, 0.0)


def limits_of_rows(
    call: Call, values: np.ndarray, gradients: np.ndarray, x: np.ndarray, slopes: Any, errors: Any = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Tolerances of losses `[N]` and of gradients `[N, C]` of logits `x`.

    `slopes` bounds how much of each class's own error reaches the loss beside that of its probability.
    """
    loss, gradient, eps = precision_of(call)
    options = dict(call.program.options)
    p, delta = conditioned(x, call, errors)
    p, x = finite(p), finite(x)
    focal = (1 + options.get("focal_gamma", 0.0)) ** 2
    of_probability = p * (delta + (p * delta).sum(1, keepdims=True))
    factor = np.maximum(1.0, np.abs(slopes).sum(1, keepdims=True)) * focal
    of_loss = (factor * p * delta + focal * np.abs(slopes) * delta).sum(1)
    of_gradient = 2 * factor * of_probability
    # Where neither is 0 or 1, the difference of a probability and a target cancels; the sum of C terms is rounded, and
    # so is a smoothed target, of a single class too.
    is_soft = ((slopes != 0).sum(1, keepdims=True) > 1) | (options.get("label_smoothing", 0.0) > 0)
    of_sum = max(1.0, np.sqrt(x.shape[1]) / 2)
    of_gradient = of_gradient + eps * of_sum * focal * is_soft * (factor * p + np.abs(slopes))
    if z := options.get("z_loss", 0.0):
        largest = np.abs(x).max(1)
        lse = largest + np.log(x.shape[1])
        error_of_lse = 2 * eps * lse + (p * delta).sum(1)
        of_loss = of_loss + 2 * z * lse * error_of_lse
        of_gradient = of_gradient + 2 * z * (p * error_of_lse[:, None] + lse[:, None] * of_probability)
    if cap := options.get("logit_softcap"):
        # The slope of the cap falls as exp(-2 x / c), whose exponent is rounded.
        of_gradient = of_gradient + 2 * eps * np.minimum(np.abs(x) / cap, 100) * np.abs(finite(gradients))
    at_most = np.abs(finite(gradients)).max(1, keepdims=True)
    return loss * np.abs(finite(values)) + of_loss, gradient * focal * at_most + of_gradient


def rounded_to(tolerance: Any, value: np.ndarray, dtype: str) -> Limits:
    """The limits of a gradient that is rounded to a dtype at last."""
    if dtype in ROUNDING:
        relative, smallest = ROUNDING[dtype]
        tolerance = tolerance * (1 + relative) + relative * np.abs(finite(value)) + smallest
    return Limits(value, np.broadcast_to(tolerance, value.shape))


def softmax(call: Call) -> Expected:
    """Of `softmax_cross_entropy`."""
    x, q = call.arrays["logits"], call.arrays["targets"]
    options = {n: v for n, v in call.program.options if n != "axis"}
    axis = call.program.get("axis", -1)
    x, q = (np.moveaxis(a, axis, -1).reshape(-1, a.shape[axis]).astype("float64") for a in (x, q))
    weights = call.arrays.get("class_weight")
    losses, gradients, of_targets = oracles.softmax(q, x, class_weight=weights, **options)
    smoothing = options.get("label_smoothing", 0.0)
    a = q * (1 - smoothing) + smoothing / x.shape[1]
    a = a if weights is None else a * weights
    of_loss, of_gradient = limits_of_rows(call, losses, gradients, x, a)
    # A row of zeros is where smoothing begins, and has no derivative for its targets.
    _, delta = conditioned(x, call)
    loss, _, eps = precision_of(call)
    w = 1.0 if weights is None else weights
    focal = (1 + options.get("focal_gamma", 0.0)) ** 2
    for_targets = (
        focal
        * w
        * (delta + finite(np.exp([oracles.log_softmax(r) for r in x])).reshape(x.shape) * delta.sum(1, keepdims=True))
    )
    for_targets = for_targets + 2 * focal * loss * np.abs(finite(of_targets))
    if smoothing:
        for_targets[~q.any(1)] = np.inf
    return _of_logits(
        call, losses, of_loss, {"logits": (gradients, of_gradient), "targets": (of_targets, for_targets)}, axis
    )


def sparse(call: Call) -> Expected:
    """Of `sparse_softmax_cross_entropy`."""
    options = {n: v for n, v in call.program.options if n not in ("axis", "ignore_class")}
    axis = call.program.get("axis", -1)
    x = np.moveaxis(call.arrays["logits"], axis, -1)
    x = x.reshape(-1, x.shape[-1]).astype("float64")
    found = sparse_rows(call, x, options)
    if found is None:
        return Expected(raises=True)
    losses, of_loss, gradients, of_gradient = found
    return _of_logits(call, losses, of_loss, {"logits": (gradients, of_gradient)}, axis)


def validity(call: Call) -> np.ndarray:
    """Returns which labels are valid, flat."""
    labels = call.arrays["labels"].reshape(-1)
    mask = call.arrays.get("mask", np.ones(labels.shape, bool)).reshape(-1)
    ignored = call.program.get("ignore_class")
    return mask if ignored is None else mask & (labels != ignored)


def sparse_rows(call: Call, x: np.ndarray, options: dict, errors: Any = 0.0, counted: Any = True) -> Any:
    """Losses, their tolerances, gradients and theirs, of rows of logits; None where an error is to be raised."""
    labels = call.arrays["labels"].reshape(-1).astype("int64")
    is_class = (labels >= 0) & (labels < x.shape[1])
    valid = validity(call)
    bad = valid & counted & ~is_class
    if bad.any() and call.program.mode in ("eager", "graph"):
        return None
    labels = np.where(is_class, labels, 0)
    weights = call.arrays.get("class_weight")
    losses, gradients = oracles.sparse(labels, x, class_weight=weights, **options)
    losses[bad], gradients[bad] = np.nan, np.nan
    smoothing = options.get("label_smoothing", 0.0)
    a = np.eye(x.shape[1])[labels] * (1 - smoothing) + smoothing / x.shape[1]
    of_loss, of_gradient = limits_of_rows(call, losses, gradients, x, a if weights is None else a * weights, errors)
    return losses, of_loss, gradients, of_gradient


def _of_logits(call, losses, of_loss, gradients, axis):
    """Returns the results of a kernel of logits for these rows, masked, times the upstream gradient."""
    upstream = call.arrays["upstream"].reshape(-1)
    valid = (
        validity(call) if "labels" in call.arrays else call.arrays.get("mask", np.ones(upstream.shape, bool)).ravel()
    )
    shape = call.arrays["upstream"].shape
    result = Expected(cases=len(losses))
    result.values = [Limits(np.where(valid, losses, 0).reshape(shape), np.where(valid, of_loss, 0).reshape(shape))]
    factor = np.where(valid, upstream, 0)[:, None]
    for name, (gradient, tolerance) in gradients.items():
        arrays = (_product(factor, gradient), _product(np.abs(factor), tolerance))
        arrays = (np.moveaxis(a.reshape(*shape, gradient.shape[-1]), -1, axis) for a in arrays)
        value, tolerance = arrays
        result.gradients[name] = rounded_to(tolerance, value, call.program.dtype)
    return result


def sigmoid(call: Call) -> Expected:
    """Of `sigmoid_cross_entropy`."""
    options = {n: v for n, v in call.program.options if n not in ("axis", "ignore_class")}
    x, y = call.arrays["logits"].astype("float64"), call.arrays["labels"].astype("float64")
    valid = call.arrays.get("mask", np.ones(x.shape, bool))
    ignored = call.program.get("ignore_class")
    if ignored is not None:
        valid = valid & ~(np.isnan(y) if np.isnan(ignored) else y == ignored)
    x, y = np.where(valid, x, 0), np.where(valid, y, 0)
    soft = (y >= -0.21) & (y <= 1.21)
    pos_weight = call.arrays.get("pos_weight", 1.0)
    losses, gradients, of_labels = oracles.sigmoid(np.where(soft, y, 0.5), x, pos_weight=pos_weight, **options)
    losses, gradients, of_labels = (np.where(soft, a, np.nan) for a in (losses, gradients, of_labels))
    count = np.ones_like(losses)
    if call.program.get("axis") is not None:
        count = np.broadcast_to(np.maximum(valid.sum(-1, keepdims=True), 1), x.shape)
        bad = ~soft.all(-1, keepdims=True)
        gradients, of_labels = (np.where(bad, np.nan, a) for a in (gradients, of_labels))
    loss, gradient, eps = precision_of(call)
    focal = (1 + options.get("focal_gamma", 0.0)) ** 2
    # Noisy labels, below 0 or above 1, are weights of either sign.
    with np.errstate(invalid="ignore", over="ignore"):
        noise = np.maximum(0, np.maximum(-y, y - 1))
        terms = np.abs(losses) + noise * (np.maximum(1.0, pos_weight) * (np.abs(x) + 1))
    of_loss = loss * focal * finite(np.where(soft, terms, 0))
    # Of two terms of the sizes of 1 and w, which may cancel. That of a label is the difference of two costs.
    small = np.exp(-np.abs(np.where(np.isnan(x), 0, x)))
    size = np.maximum(1.0, pos_weight) * np.where(np.abs(finite(gradients)) > 0, 1.0, 0.0)
    is_soft = (y != 0) & (y != 1) | (options.get("label_smoothing", 0.0) > 0)
    of_gradient = gradient * focal * np.maximum(np.abs(finite(gradients)), size * is_soft * np.maximum(small, 1e-3))
    of_gradient = of_gradient + eps * focal * np.abs(finite(gradients)) * 4
    for_labels = 4 * focal * loss * (np.abs(finite(of_labels)) + np.maximum(1.0, pos_weight) * np.abs(finite(x)) + 1)
    if focal > 1 or "focal_alpha" in options:
        # Factors and terms of logits that nearly overflow.
        for_labels = np.where(np.abs(x) > 1e36, np.inf, for_labels)
    if options.get("label_smoothing") == 1:
        # A label that is smoothed away has no derivative, whatever it is and costs.
        of_labels, for_labels = finite(of_labels), np.where(np.isnan(of_labels), np.inf, for_labels)
    upstream = call.arrays["upstream"]
    result = Expected()
    if call.program.get("axis") is None:
        values, tolerance = np.where(valid, losses, 0), np.where(valid, of_loss, 0)
        factor = np.where(valid, upstream, 0)
        result.cases = values.size
    else:
        values = np.where(valid, losses, 0).sum(-1) / count[..., 0]
        tolerance = np.where(valid, of_loss, 0).sum(-1) / count[..., 0]
        factor = np.where(valid, upstream[..., None] / count, 0)
        bad = ~soft.all(-1)
        values = np.where(bad, np.nan, values)
        result.cases = values.size
    result.values = [Limits(values, tolerance)]
    for name, array, limit in (("logits", gradients, of_gradient), ("labels", of_labels, for_labels)):
        value = _product(factor, array)
        limit = _product(np.abs(factor), limit)
        if name == "labels" and options.get("label_smoothing") == 1 and call.program.get("axis") is not None:
            # Anything goes in a row that is lost, as for its valid labels above.
            limit = np.where(bad[..., None], np.inf, limit)
        result.gradients[name] = rounded_to(limit, value, call.program.dtype)
    return result


def reduction(call: Call) -> Expected:
    """Of `reduce`: one value, and the gradient for each loss."""
    arrays = call.arrays
    losses = arrays["losses"].astype("float64")
    valid = arrays.get("valid", np.ones(losses.shape, bool))
    weights = arrays.get("weights", np.ones(losses.shape)).astype("float64")
    of_labels = np.where(valid & (weights != 0), arrays.get("label_weights", np.ones(losses.shape)), 1.0)
    c = coefficients(call.program.get("reduction"), valid, weights, of_labels, call.program.get("normalizer"))
    products = _product(c, losses)
    is_reduced = call.program.get("reduction") not in (None, "none")
    values = products.sum() if is_reduced else products
    # Negative weights cancel in numerator and denominator.
    mass = weights * valid * of_labels
    over = tuple(range(1, mass.ndim)) if call.program.get("reduction") == "sequence_mean" else None
    total, size = np.abs(mass.sum(over)), np.abs(mass).sum(over)
    cancelled = np.max(np.where(total == 0, 1.0, size / np.where(total == 0, 1.0, total)), initial=1.0)
    tolerance = precision_of(call)[0] * (np.abs(products).sum() if is_reduced else np.abs(products)) * cancelled
    upstream = call.arrays["upstream"]
    return Expected(
        [Limits(np.asarray(values), np.asarray(tolerance))],
        {"losses": Limits(c * upstream, np.abs(c * upstream) * 1e-6 * cancelled)},
    )
