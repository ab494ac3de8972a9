"""Losses of what a head gives, by our kernels or from dense logits as one writes them with Keras, on either backend.

Each is a function of all arrays of its case, by name, that returns the loss and further results.
"""

import functools
from collections.abc import Callable

import keras
from keras import ops

import keras_xent as kx
from tools.bench.data import ENTROPY_BONUS, PAIRS, TEMPERATURE, TOP

QUESTIONS = ("statistics", "accuracy", "policy", "top_k", "likeliest", "dpo", "distillation", "lora")


def peer(name: str, case: dict) -> tuple[Callable, tuple[str, ...]]:
    """The loss of a peer, and the names of the arrays that have a gradient."""
    parts, trained = name.split(", "), ("hidden", "kernel")
    if case["question"] == "lora":
        trained = {"LoRA": ("hidden", "down", "up"), "frozen": ("hidden",)}.get(parts[-1], trained)
        return functools.partial(_of_largest, trained), trained
    if case["question"] == "accuracy":
        logits_of = _logits_rounded_once if name == "float64 after the logits" else _logits
        loss = _sum if parts[0] == "ours" else functools.partial(_sum_of_logits, logits_of)
        return functools.partial(loss, case["output"]), trained
    if case["question"] == "statistics" or parts[-1] == "labels":
        return functools.partial(_of_labels, [part for part in parts if part in ("entropy", "logsumexp")]), trained
    losses = {
        "dpo": (_dpo, _dpo_of_logits),
        "distillation": (_distillation, _kl_of_logits),
        "policy": (_policy, _policy_of_logits),
        "top_k": (_top_k, _top_k_of_logits),
        "likeliest": (_likeliest, _likeliest_of_logits),
    }
    return losses[case["question"]][parts[0] != "ours"], trained if case.get("gradients", True) else ()


def _of_labels(names, arrays):
    """The cross-entropy of labels, with statistics of these names, which a metric would read."""
    loss, found = kx.kernels.linear_cross_entropy(
        arrays["hidden"], arrays["kernel"], arrays["labels"], reduction="token_mean", return_statistics=names
    )
    return loss, {name: getattr(found, name) for name in names}


def _of_largest(trained, arrays):
    low_rank = (arrays["down"], arrays["up"]) if "down" in trained else None
    gradients = tuple(dict.fromkeys("low_rank" if name in ("down", "up") else name for name in trained))
    loss = kx.kernels.linear_cross_entropy(
        *(arrays[name] for name in ("hidden", "kernel", "labels")),
        low_rank=low_rank,
        gradients=gradients,
        reduction="token_mean",
    )
    return loss, {}


def _sum(output, arrays):
    found = kx.kernels.linear_token_statistics(arrays["hidden"], arrays["kernel"], arrays["labels"])
    value = getattr(found, output)
    return ops.sum(value), {"value": value}


def _sum_of_logits(logits_of, output, arrays):
    logits = logits_of(arrays)
    if output == "log_prob":
        value = _log_probs_of_logits(logits, arrays["labels"])
    elif output == "logsumexp":
        value = ops.logsumexp(logits, axis=1)
    else:
        log_p = ops.log_softmax(logits)
        value = -ops.sum(ops.exp(log_p) * log_p, axis=1)
    return ops.sum(value), {"value": value}


def _policy(arrays):
    found = kx.kernels.linear_token_statistics(arrays["hidden"], arrays["kernel"], arrays["labels"])
    return -ops.mean(found.log_prob + ENTROPY_BONUS * found.entropy), {}


def _policy_of_logits(arrays):
    log_p = ops.log_softmax(_logits(arrays))
    entropy = -ops.sum(ops.exp(log_p) * log_p, axis=1)
    of_labels = ops.take_along_axis(log_p, arrays["labels"][:, None], axis=1)[:, 0]
    return -ops.mean(of_labels + ENTROPY_BONUS * entropy), {}


def _logits(arrays, of=""):
    """In float32, as for a loss in mixed precision."""
    return ops.cast(ops.matmul(arrays[f"{of}hidden"], arrays[f"{of}kernel"]), "float32")


def _logits_rounded_once(arrays):
    """Those of the float32 product, from which all else is computed in float64, the products of the gradients too."""
    exact = ops.matmul(*(ops.cast(arrays[name], "float64") for name in ("hidden", "kernel")))
    return exact + ops.stop_gradient(ops.cast(_logits(arrays), "float64") - exact)


def _dpo(arrays):
    hidden, labels = (_in_pairs(arrays[name]) for name in ("hidden", "labels"))
    reference = ops.zeros((PAIRS,))
    return kx.kernels.linear_sequence_loss(
        hidden, arrays["kernel"], labels, loss=kx.preference.dpo, arrays=(reference, reference)
    ), {}


def _in_pairs(array):
    """The first half of the sequences was preferred to the other: `[pairs, 2, tokens, ...]`."""
    return ops.stack(ops.split(ops.reshape(array, (2 * PAIRS, -1, *array.shape[1:])), 2), axis=1)


def _dpo_of_logits(arrays):
    return _of_pairs(_log_probs_of_logits(_logits(arrays), arrays["labels"]))


def _log_probs_of_logits(logits, labels):
    if keras.backend.backend() == "tensorflow":
        # One operation of TensorFlow's own.
        return -keras.losses.sparse_categorical_crossentropy(labels, logits, from_logits=True)
    # On JAX Keras' loss has one-hot labels, which cost more than this.
    return ops.take_along_axis(logits, labels[:, None], axis=1)[:, 0] - ops.logsumexp(logits, axis=1)


def _of_pairs(log_probs):
    chosen, rejected = ops.split(ops.sum(ops.reshape(log_probs, (2 * PAIRS, -1)), axis=1), 2)
    reference = ops.zeros_like(chosen)
    return ops.mean(kx.preference.dpo(chosen, rejected, reference, reference)), {}


def _distillation(arrays):
    heads = (arrays[name] for name in ("hidden", "kernel", "teacher_hidden", "teacher_kernel"))
    return kx.kernels.linear_distillation(*heads, temperature=TEMPERATURE, reduction="token_mean"), {}


def _kl_of_logits(arrays):
    """The formula of Keras' `LogitsDistillation`, with log-softmax in place of a clipped softmax."""
    log_p, log_q = (ops.log_softmax(_logits(arrays, of) / TEMPERATURE) for of in ("teacher_", ""))
    return TEMPERATURE**2 * ops.mean(ops.sum(ops.exp(log_p) * (log_p - log_q), axis=1)), {}


def _top_k(arrays):
    inputs = (arrays[name] for name in ("hidden", "kernel", "ids", "log_probs"))
    return kx.kernels.linear_top_k_distillation(*inputs, reduction="token_mean"), {}


def _top_k_of_logits(arrays):
    log_q = ops.take_along_axis(ops.log_softmax(_logits(arrays)), arrays["ids"], axis=1)
    log_p = arrays["log_probs"]
    return ops.mean(ops.sum(ops.exp(log_p) * (log_p - log_q), axis=1)), {}


def _number_of_likeliest(arrays):
    return min(TOP, arrays["kernel"].shape[1])


def _likeliest(arrays):
    ids, log_probs = kx.kernels.linear_top_k(arrays["hidden"], arrays["kernel"], _number_of_likeliest(arrays))
    return ops.mean(ops.sum(log_probs, axis=1)), {"ids": ids, "log_probs": log_probs}


def _likeliest_of_logits(arrays):
    log_probs, ids = ops.top_k(ops.log_softmax(_logits(arrays)), _number_of_likeliest(arrays))
    return ops.mean(ops.sum(log_probs, axis=1)), {"ids": ids, "log_probs": log_probs}
