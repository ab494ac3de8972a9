"""Losses of what a head gives on PyTorch, from dense logits as its users write them, and Liger's fused ones.

Each is a function of the hidden states, the kernel `[classes, features]` and the other arrays of its case.
"""

from collections.abc import Callable

import torch.nn.functional as F

from tools.bench.data import ENTROPY_BONUS, PAIRS, TEMPERATURE, TOP


def loss(name: str, case: dict) -> Callable:
    """The loss of a peer."""
    by_liger = {"dpo": _dpo_by_liger, "distillation": _distillation_by_liger}
    of_logits = {
        "policy": _policy,
        "dpo": _dpo,
        "distillation": _distillation,
        "top_k": _top_k,
        "likeliest": _likeliest,
    }
    return (by_liger if name == "Liger" else of_logits)[case["question"]]


def _logits(hidden, kernel):
    """In float32, as for a loss in mixed precision."""
    return (hidden @ kernel.T).float()


def _policy(hidden, kernel, labels):
    log_p = F.log_softmax(_logits(hidden, kernel), dim=1)
    entropy = -(log_p.exp() * log_p).sum(dim=1)
    return -(log_p.gather(1, labels[:, None])[:, 0] + ENTROPY_BONUS * entropy).mean()


def _dpo(hidden, kernel, labels):
    """Of sequences of which the first half was preferred to the other, with a reference that is even."""
    log_probs = -F.cross_entropy(_logits(hidden, kernel), labels, reduction="none")
    chosen, rejected = log_probs.reshape(2 * PAIRS, -1).sum(dim=1).chunk(2)
    return -F.logsigmoid(0.1 * (chosen - rejected)).mean()


def _dpo_by_liger(hidden, kernel, labels):
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    sequences = hidden.reshape(2 * PAIRS, -1, hidden.shape[1])
    of_liger = LigerFusedLinearDPOLoss(beta=0.1, use_ref_model=False)
    return of_liger(kernel, sequences, labels.reshape(2 * PAIRS, -1))[0]


def _distillation(hidden, kernel, labels, teacher_hidden, teacher_kernel):
    log_p = F.log_softmax(_logits(teacher_hidden, teacher_kernel) / TEMPERATURE, dim=1)
    log_q = F.log_softmax(_logits(hidden, kernel) / TEMPERATURE, dim=1)
    return TEMPERATURE**2 * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def _distillation_by_liger(hidden, kernel, labels, teacher_hidden, teacher_kernel):
    from liger_kernel.transformers import LigerFusedLinearJSD

    # Its beta is the weight of the mixture's other side: 0 is the forward divergence.
    of_liger = LigerFusedLinearJSD(jsd_beta=0.0, temperature=TEMPERATURE)
    return TEMPERATURE**2 * of_liger(hidden, kernel, teacher_hidden, teacher_kernel, labels)


def _top_k(hidden, kernel, labels, ids, log_probs):
    log_q = F.log_softmax(_logits(hidden, kernel), dim=1).gather(1, ids)
    return (log_probs.exp() * (log_probs - log_q)).sum(dim=1).mean()


def _likeliest(hidden, kernel, labels):
    log_probs, _ = F.log_softmax(_logits(hidden, kernel), dim=1).topk(min(TOP, len(kernel)), dim=1)
    return log_probs.sum(dim=1).mean()
