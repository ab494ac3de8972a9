"""Losses of heads and their gradients by float64 NumPy, in chunks of tokens."""

from pathlib import Path

import numpy as np

from tools.bench import data

# Logits of a chunk.
_MOST = 2**24


def expected(case: dict, folder: str | Path) -> dict[str, np.ndarray]:
    """The loss (of accuracy the output of each token), and the gradients, of as many rows as are compared."""
    arrays = {name: np.asarray(data.read(folder, name)) for name in data.names(folder)}
    arrays |= {name: data.floats(arrays[name], case["dtype"]) for name in arrays if name.endswith(("hidden", "kernel"))}
    hidden, kernel = arrays["hidden"], arrays["kernel"]
    chunks, number = _chunks(case, arrays["labels"])
    part = case.get("compared", len(hidden) + len(kernel))  # rows of each gradient
    total, for_hidden, for_kernel = 0.0, np.zeros(hidden.shape), np.zeros(kernel[:part].shape)
    values = np.zeros(len(hidden))
    for chosen in chunks:
        x = hidden[chosen]
        losses, share = _RULES[case["question"]](x @ kernel, chosen, arrays, case)
        total += losses.sum()
        if case["question"] == "accuracy":
            values[chosen] = losses
        compared = chosen < part
        for_hidden[chosen[compared]] = share[compared] @ kernel.T
        for_kernel += x[:, :part].T @ share
    # Of accuracy the outputs themselves: their sum is the benchmark's.
    found = {"value": values} if case["question"] == "accuracy" else {"loss": np.asarray(total / number)}
    if case.get("gradients", True):
        found |= {"hidden": for_hidden[:part] / number, "kernel": for_kernel / number}
    return found


def _chunks(case, labels):
    """The tokens of each chunk, and what the sum of the losses is divided by."""
    most = max(1, _MOST // case["classes"])
    if case["question"] == "dpo":
        # A pair at a time: its two sequences are not next to each other.
        return np.arange(len(labels)).reshape(2, data.PAIRS, -1).swapaxes(0, 1).reshape(data.PAIRS, -1), data.PAIRS
    valid = np.flatnonzero(labels != data.IGNORED)
    return np.split(valid, range(most, len(valid), most)), 1 if case["question"] == "accuracy" else len(valid)


# Each returns losses, and the gradient of their sum for the logits, which it may overwrite.


def _of_labels(logits, chosen, arrays, case):
    log_p = _log_softmax(logits)
    places = np.arange(len(chosen)), arrays["labels"][chosen]
    losses = -log_p[places]
    share = np.exp(log_p, out=log_p)
    share[places] -= 1.0
    return losses, share


def _of_policy(logits, chosen, arrays, case):
    """-log p of the label, less a share of the entropy."""
    log_p = _log_softmax(logits)
    places, p = (np.arange(len(chosen)), arrays["labels"][chosen]), np.exp(log_p)
    entropy = -(p * log_p).sum(axis=1)
    losses = -log_p[places] - data.ENTROPY_BONUS * entropy
    share = p + data.ENTROPY_BONUS * p * (log_p + entropy[:, None])
    share[places] -= 1.0
    return losses, share


def _of_pair(logits, chosen, arrays, case):
    """-log sigmoid(0.1 (sum of the first half's log-probabilities - sum of the other's))."""
    nll, share = _of_labels(logits, chosen, arrays, case)
    sign = np.repeat([1.0, -1.0], len(nll) // 2)
    margin = -0.1 * (sign * nll).sum()
    return np.logaddexp(0.0, -margin), 0.1 / (1.0 + np.exp(margin)) * sign[:, None] * share


def _of_teacher(logits, chosen, arrays, case):
    temperature = data.TEMPERATURE
    teacher = arrays["teacher_hidden"][chosen] @ arrays["teacher_kernel"]
    log_p, log_q = _log_softmax(teacher / temperature), _log_softmax(logits / temperature)
    p = np.exp(log_p)
    losses = temperature**2 * (p * (log_p - log_q)).sum(axis=1)
    return losses, temperature * (np.exp(log_q) - p)


def _of_likeliest_classes(logits, chosen, arrays, case):
    log_q, ids, log_p = _log_softmax(logits), arrays["ids"][chosen], arrays["log_probs"][chosen].astype("float64")
    p, rows = np.exp(log_p), np.arange(len(chosen))[:, None]
    share = np.exp(log_q) * p.sum(axis=1, keepdims=True)
    np.subtract.at(share, (rows, ids), p)
    return (p * (log_p - log_q[rows, ids])).sum(axis=1), share


def _of_stored_classes(logits, chosen, arrays, case):
    """The sums of the log-probabilities of the likeliest classes, which have no gradient."""
    log_p = _log_softmax(logits)
    first = max(0, log_p.shape[1] - data.TOP)
    return np.partition(log_p, first, axis=1)[:, first:].sum(axis=1), np.zeros_like(log_p)


def _of_output(logits, chosen, arrays, case):
    """The outputs, in the place of losses."""
    if case["output"] == "log_prob":
        return tuple(-array for array in _of_labels(logits, chosen, arrays, case))
    log_p = _log_softmax(logits.copy())
    p = np.exp(log_p)
    if case["output"] == "logsumexp":
        return logits[:, 0] - log_p[:, 0], p
    entropy = -(p * log_p).sum(axis=1)
    return entropy, -p * (log_p + entropy[:, None])


def _log_softmax(logits):
    logits -= logits.max(axis=1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return logits


_RULES = {
    "linear": _of_labels,
    "statistics": _of_labels,
    "policy": _of_policy,
    "dpo": _of_pair,
    "distillation": _of_teacher,
    "top_k": _of_likeliest_classes,
    "likeliest": _of_stored_classes,
    "accuracy": _of_output,
}
