"""Naive float64 cross-entropy in NumPy, values and gradients, row by row and term by term.

Imports nothing of ours and shares no formula with it: losses are written as sums over classes, gradients as products
with the whole Jacobian of the softmax. `losses` and `gradients` take rows `[N, C]`.
"""

import numpy as np


def log_softmax(x):
    """`x - log sum exp x` of one row, with the limits of infinite logits."""
    x = np.asarray(x, np.float64)
    if np.isnan(x).any() or np.isneginf(x).all() or np.isposinf(x).sum() > 1:
        return np.full_like(x, np.nan)
    if np.isposinf(x).any():
        return np.where(np.isposinf(x), 0.0, -np.inf)
    shifted = x - x.max()
    return shifted - np.log1p(np.exp(np.delete(shifted, shifted.argmax())).sum())


def _product(weight, value):
    return 0.0 if weight == 0 else weight * value


def softmax(
    targets,
    logits,
    *,
    label_smoothing=0.0,
    class_weight=None,
    focal_gamma=0.0,
    z_loss=0.0,
    logit_softcap=None,
):
    """Losses `[N]`, gradients `[N, C]` for the logits and `[N, C]` for the targets."""
    targets, raw = np.asarray(targets, np.float64), np.asarray(logits, np.float64)
    n, c = raw.shape
    w = np.ones(c) if class_weight is None else np.asarray(class_weight, np.float64)
    losses, gradients, for_targets = np.zeros(n), np.zeros((n, c)), np.zeros((n, c))
    for i in range(n):
        x = raw[i] if logit_softcap is None else logit_softcap * np.tanh(raw[i] / logit_softcap)
        log_p = log_softmax(x)
        p = np.exp(log_p)
        smoothing = label_smoothing if targets[i].any() else 0.0
        a = w * (targets[i] * (1 - smoothing) + smoothing / c)
        # 1 - p, summed from the others' probabilities so that it is right near 0.
        u = np.array([np.delete(p, j).sum() for j in range(c)])
        terms = np.array(
            [_product(a[j], u[j] ** focal_gamma * -log_p[j] if focal_gamma else -log_p[j]) for j in range(c)]
        )
        lse = -log_p[0] + x[0] if np.isfinite(x[0]) else x.max()
        losses[i] = terms.sum() + (z_loss * lse**2 if z_loss else 0.0)
        # d loss / d p_j by the product rule, times p_j.
        slope = np.zeros(c)
        for j in range(c):
            if not focal_gamma:
                slope[j] = -a[j]
            elif p[j] == 0:
                slope[j] = -a[j]
            elif u[j] > 0:
                slope[j] = a[j] * (focal_gamma * u[j] ** (focal_gamma - 1) * p[j] * log_p[j] - u[j] ** focal_gamma)
        for j in range(c):
            jacobian = np.where(np.arange(c) == j, u[j], -p[j])
            gradients[i, j] = (slope * jacobian).sum() + (2 * z_loss * lse * p[j] if z_loss else 0.0)
        if logit_softcap is not None:
            gradients[i] /= np.cosh(np.clip(raw[i] / logit_softcap, -300, 300)) ** 2
        factor = u**focal_gamma if focal_gamma else np.ones(c)
        for_targets[i] = [_product((1 - smoothing) * w[j] * factor[j], -log_p[j]) for j in range(c)]
    return losses, gradients, for_targets


def sparse(labels, logits, *, label_smoothing=0.0, class_weight=None, focal_gamma=0.0, z_loss=0.0, logit_softcap=None):
    """Losses `[N]` and gradients `[N, C]` of integer labels."""
    targets = np.zeros(np.shape(logits))
    targets[np.arange(len(labels)), np.asarray(labels, np.int64)] = 1.0
    losses, gradients, _ = softmax(
        targets,
        logits,
        label_smoothing=label_smoothing,
        class_weight=class_weight,
        focal_gamma=focal_gamma,
        z_loss=z_loss,
        logit_softcap=logit_softcap,
    )
    return losses, gradients


def _softplus(x):
    return np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))


def _sigmoid(x):
    small = np.exp(-np.abs(x))
    return np.where(x >= 0, 1.0, small) / (1.0 + small)


def sigmoid(labels, logits, *, label_smoothing=0.0, pos_weight=1.0, focal_gamma=0.0, focal_alpha=None):
    """Losses and gradients for logits and for labels, elementwise."""
    y, x = np.asarray(labels, np.float64), np.asarray(logits, np.float64)
    y = y * (1 - label_smoothing) + label_smoothing / 2
    p, q = _sigmoid(x), _sigmoid(-x)
    positive, negative = _softplus(-x), _softplus(x)
    with np.errstate(invalid="ignore"):
        loss = np.where(y == 0, 0, pos_weight * y * positive) + np.where(y == 1, 0, (1 - y) * negative)
        slope = (1 - y) * p - pos_weight * y * q
        for_labels = pos_weight * positive - negative
        if focal_gamma:
            u = y * q + (1 - y) * p
            with np.errstate(divide="ignore"):
                inner = np.where(u > 0, focal_gamma * u ** (focal_gamma - 1) * loss, 0.0)
            turn = (1 - 2 * y) * p * q
            slope = u**focal_gamma * slope + np.where(turn == 0, 0.0, inner * turn)
            for_labels = u**focal_gamma * for_labels + np.where(q == p, 0.0, inner * (q - p))
            loss = np.where(u == 0, 0.0, u**focal_gamma * loss)
        if focal_alpha is not None:
            balance = focal_alpha * y + (1 - focal_alpha) * (1 - y)
            for_labels = balance * for_labels + (2 * focal_alpha - 1) * loss
            loss, slope = balance * loss, balance * slope
    return loss, slope, (1 - label_smoothing) * for_labels
