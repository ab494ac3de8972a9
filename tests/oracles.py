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
        u = np.array([np.delete(p, j).sum() for j in range(c)]) + 0.0 * p
        terms = np.array(
            [_product(a[j], u[j] ** focal_gamma * -log_p[j] if focal_gamma else -log_p[j]) for j in range(c)]
        )
        lse = x[x.argmax()] - log_p[x.argmax()]
        losses[i] = terms.sum() + (z_loss * lse**2 if z_loss else 0.0)
        # d loss / d p_j by the product rule, times p_j.
        slope = np.zeros(c)
        for j in range(c):
            if not focal_gamma:
                slope[j] = -a[j]
            elif p[j] == 0:
                slope[j] = -a[j]
            elif not u[j] <= 0:
                slope[j] = a[j] * (focal_gamma * u[j] ** (focal_gamma - 1) * p[j] * log_p[j] - u[j] ** focal_gamma)
        for j in range(c):
            jacobian = np.where(np.arange(c) == j, u[j], -p[j])
            gradients[i, j] = (slope * jacobian).sum() + (2 * z_loss * lse * p[j] if z_loss else 0.0)
        if logit_softcap is not None:
            gradients[i] /= np.cosh(np.clip(raw[i] / logit_softcap, -300, 300)) ** 2
        factor = u**focal_gamma if focal_gamma else np.ones(c)
        for_targets[i] = [_product((1 - smoothing) * w[j], factor[j] * -log_p[j]) for j in range(c)]
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
        loss = np.where(pos_weight * y == 0, 0, pos_weight * y * positive) + np.where(y == 1, 0, (1 - y) * negative)
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


def _capped(x, cap):
    """Logits after a soft cap, and the slope of the cap."""
    if cap is None:
        return x, 1.0
    return cap * np.tanh(x / cap), 1 / np.cosh(np.clip(x / cap, -300, 300)) ** 2


def _of_logits(p, slopes):
    """The gradient for logits from `p_c` times the derivative for `p_c`, by the Jacobian of the softmax."""
    return slopes - p * slopes.sum()


def token_statistics(labels, logits, *, temperature=1.0, logit_softcap=None):
    """Values `[4, N]` (log-probability, entropy, log-sum-exp, rank) and gradients `[3, N, C]` of the first three."""
    raw = np.asarray(logits, np.float64)
    values, gradients = np.zeros((4, len(raw))), np.zeros((3, *raw.shape))
    for i, k in enumerate(np.asarray(labels, np.int64)):
        x, slope = _capped(raw[i], logit_softcap)
        x = x / temperature
        log_p = log_softmax(x)
        p = np.exp(log_p)
        finite_log_p = np.where(p == 0, 0, log_p)
        top = x.argmax()
        rank = sum(x[c] > x[k] or (x[c] == x[k] and c < k) for c in range(len(x)))
        values[:, i] = log_p[k], -(p * finite_log_p).sum(), x[top] - log_p[top], rank
        one_hot = np.arange(len(x)) == k
        for which, slopes in enumerate((one_hot * 1.0, -p * (finite_log_p + 1), p)):
            # That of the log-sum-exp is no function of p.
            gradient = p if which == 2 else _of_logits(p, slopes)
            gradients[which, i] = np.where(slope == 0, 0, gradient * slope) / temperature
    return values, gradients


def divergence(
    student, teacher, *, divergence="forward_kl", temperature=1.0, beta=0.5, softcap=None, teacher_softcap=None
):
    """Losses `[N]` and their gradients `[N, C]` for the student's logits, from the teacher's."""
    student, teacher = np.asarray(student, np.float64), np.asarray(teacher, np.float64)
    losses, gradients = np.zeros(len(student)), np.zeros(student.shape)
    for i in range(len(student)):
        x, slope = _capped(student[i], softcap)
        log_q = log_softmax(x / temperature)
        log_p = log_softmax(_capped(teacher[i], teacher_softcap)[0] / temperature)
        p, q = np.exp(log_p), np.exp(log_q)
        if divergence == "forward_kl":
            loss, slopes = _kl(log_p, log_q), -p
        elif divergence == "reverse_kl":
            loss = _kl(log_q, log_p)
            slopes = q * (_log_ratio(log_q, log_p) + 1)
        else:
            m = beta * p + (1 - beta) * q
            log_m = np.log(np.where(m > 0, m, 1))
            loss = beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)
            share = np.where(m > 0, q / np.where(m > 0, m, 1), 0)
            slopes = (1 - beta) * (q * (_log_ratio(log_q, log_m) + 1 - (1 - beta) * share) - beta * p * share)
        losses[i] = temperature**2 * loss
        gradients[i] = temperature * _of_logits(q, slopes) * slope
    return losses, gradients


def top_k_divergence(student, ids, log_probs, *, temperature=1.0, softcap=None):
    """Losses and gradients for the student's logits of a teacher known by its probabilities of classes `ids`."""
    student = np.asarray(student, np.float64)
    losses, gradients = np.zeros(len(student)), np.zeros(student.shape)
    for i in range(len(student)):
        x, slope = _capped(student[i], softcap)
        log_q = log_softmax(x / temperature)
        slopes = np.zeros(len(x))
        for c, log_p in zip(ids[i], np.asarray(log_probs[i], np.float64), strict=True):
            if 0 <= c < len(x):
                losses[i] += temperature**2 * _product(np.exp(log_p), log_p - log_q[c])
                slopes[c] -= np.exp(log_p)
        gradients[i] = temperature * _of_logits(np.exp(log_q), slopes) * slope
    return losses, gradients


def _log_ratio(log_p, log_q):
    """`log p - log q`, 0 where p is 0."""
    return np.where(np.isneginf(log_p), 0, log_p - np.where(np.isneginf(log_p), 0, log_q))


def _kl(log_p, log_q):
    return (np.exp(log_p) * _log_ratio(log_p, log_q)).sum()
