"""What the trainers of TRL compute under their options, in float64 NumPy.

Read from github.com/huggingface/trl at f2cd577.
"""

from functools import partial
from types import SimpleNamespace

import numpy as np


def configs(arrays):
    """`DPOConfig(...)` and others, which return the loss of these arrays."""
    losses = (dpo, kto, orpo, cpo, gkd, grpo)
    arrays = {name: array.astype("float64") for name, array in arrays.items()}
    return SimpleNamespace(
        **{f"{loss.__name__.upper()}Config": partial(loss, SimpleNamespace(**arrays)) for loss in losses}
    )


def log_sigmoid(x):
    return -np.logaddexp(0, -x)


def dpo(of, loss_type="sigmoid", beta=0.1, label_smoothing=0.0):
    chosen, rejected = of.c - of.rc, of.r - of.rr
    if loss_type in ("ipo", "sigmoid_norm"):
        chosen, rejected = chosen / of.tokens_c, rejected / of.tokens_r
    margin = chosen - rejected
    if loss_type == "ipo":
        return np.mean((margin - 1 / (2 * beta)) ** 2)
    clean, flipped = -log_sigmoid(beta * margin), -log_sigmoid(-beta * margin)
    s = label_smoothing if loss_type == "robust" else 0.0
    return np.mean(((1 - s) * clean - s * flipped) / (1 - 2 * s))


def kto(of, loss_type="kto", beta=0.1, desirable_weight=1.0, undesirable_weight=1.0):
    kl = max(np.mean(of.kl), 0) if loss_type == "kto" else 0.0
    gain = beta * (of.c - of.rc - kl)
    of_good, of_bad = desirable_weight / (1 + np.exp(gain)), undesirable_weight / (1 + np.exp(-gain))
    return np.mean(np.where(of.good > 0, of_good, of_bad))


def orpo(of, beta):
    chosen, rejected = of.c / of.tokens_c, of.r / of.tokens_r
    odds = [x - np.log(-np.expm1(x)) for x in (chosen, rejected)]
    return of.nll - beta * np.mean(log_sigmoid(odds[0] - odds[1]))


def cpo(of, loss_type, beta, simpo_gamma, cpo_alpha):
    assert loss_type == "simpo" and cpo_alpha == 0
    margin = of.c / of.tokens_c - of.r / of.tokens_r - simpo_gamma / beta
    return np.mean(-log_sigmoid(beta * margin))


def gkd(of, beta=0.5):
    teacher, student = (x - np.log(np.exp(x).sum(axis=-1, keepdims=True)) for x in (of.zt, of.xt))
    mixture = np.log(beta * np.exp(teacher) + (1 - beta) * np.exp(student))

    def kl(log_p, log_q):
        return (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)

    if beta == 0:
        losses = kl(teacher, student)
    elif beta == 1:
        losses = kl(student, teacher)
    else:
        losses = beta * kl(teacher, mixture) + (1 - beta) * kl(student, mixture)
    return losses[of.kt != -100].mean()


def grpo(
    of,
    loss_type="dapo",
    importance_sampling_level="token",
    epsilon=0.2,
    epsilon_high=None,
    beta=0.0,
    top_entropy_quantile=1.0,
    max_completion_length=None,
):
    log_ratio, mask, advantages = of.lp - of.old, of.mask, of.a[:, None]
    tokens = mask.sum(axis=1, keepdims=True).clip(min=1)
    if importance_sampling_level == "sequence":
        log_ratio = (log_ratio * mask).sum(axis=1, keepdims=True) / tokens
    ratio = np.exp(log_ratio)
    clipped = np.clip(ratio, 1 - epsilon, 1 + (epsilon if epsilon_high is None else epsilon_high))
    losses = -np.minimum(ratio * advantages, clipped * advantages)
    if top_entropy_quantile < 1:
        losses = losses * (of.entropy >= np.quantile(of.entropy[mask > 0], 1 - top_entropy_quantile))
    if beta:
        losses = losses + beta * (np.exp(of.ref - of.lp) - (of.ref - of.lp) - 1)
    losses = losses * mask
    if loss_type == "grpo":
        return np.mean(losses.sum(axis=1) / tokens[:, 0])
    return losses.sum() / (len(mask) * max_completion_length if loss_type == "dr_grpo" else mask.sum())
