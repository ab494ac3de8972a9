"""The measured rows of what a head gives beside its loss: each is compared with the same from dense logits."""

from collections.abc import Iterator

from tools.bench.shapes import GEMMA2, MANY_TOKENS, SMALL_MODEL, Head
from tools.bench.work import Work, of_head, of_model

OURS = {"ours": "tensorflow", "ours, JAX": "jax"}
DENSE = {"Keras, graph": "tensorflow", "Keras, XLA": "tensorflow", "Keras, JAX": "jax"}
STATISTICS = "entropy, logsumexp"
FOUR_METRICS = "Entropy, CalibrationError, Perplexity, Perplexity"

# The peers of each question. Those that do other work than the first are `beside` it: they are timed, not compared.
PEERS = {
    "statistics": {
        "ours": "tensorflow",
        f"ours, {STATISTICS}": "tensorflow",
        "ours, JAX": "jax",
        f"ours, JAX, {STATISTICS}": "jax",
    },
    "likeliest": OURS | DENSE,
    "top_k": OURS | {"ours, labels": "tensorflow", "ours, JAX, labels": "jax"},
    "dpo": OURS | DENSE,
    "distillation": OURS | DENSE | {"floor": "tensorflow"},
}
BESIDE = {"top_k": ("ours, labels", "ours, JAX, labels")}
WITHOUT_GRADIENTS = {"likeliest": {"gradients": False}}


def times(question: str) -> Iterator[Work]:
    """Loss and gradients of many tokens, or what is computed without gradients."""
    case = case_of(question, MANY_TOKENS, beside=list(BESIDE.get(question, ())))
    yield Work(question.replace("_", "-"), case, PEERS[question])


def memory(question: str) -> Iterator[Work]:
    """The peak memory of the same, in fresh processes."""
    peers = {name: library for name, library in PEERS[question].items() if name != "floor"}
    case = case_of(question, MANY_TOKENS, calls=2)
    yield Work(f"{question.replace('_', '-')}-memory", case, peers, "megabytes")


def case_of(question: str, head: Head, **more) -> dict:
    """The case of a question about a head. Every label is valid."""
    case = of_head(head) | {"question": question, **WITHOUT_GRADIENTS.get(question, {}), **more}
    return {name: value for name, value in case.items() if name != "valid"}


def low_rank() -> Iterator[Work]:
    """Peak memory of the largest head, of which two factors of rank 8 are trained, or nothing, or all."""
    peers = dict.fromkeys(("ours, LoRA", "ours, frozen", "ours"), "tensorflow")
    yield Work("lora-memory", case_of("lora", GEMMA2, calls=1), peers, "megabytes")


def scores(unit: str) -> Iterator[Work]:
    """The log-probabilities of tokens under a model of KerasHub: peak memory, and on TensorFlow the time.

    On JAX its `score()` makes one-hot labels, which takes a quarter of a minute.
    """
    case = {"question": "score", "batch": 32, "length": 128, "rows": 4096, "features": 64, "classes": 131_072}
    for library in ("tensorflow",) if unit == "milliseconds" else ("tensorflow", "jax"):
        peers = dict.fromkeys(("ours", "KerasHub"), library)
        row = "score" if unit == "milliseconds" else "score-memory"
        yield Work(row, case | {"dtype": "float32", "backend": library}, peers, unit)


def four_metrics() -> Iterator[Work]:
    """The time that four metrics add to a step with a fused head."""
    for library in "tensorflow", "jax":
        peers = dict.fromkeys(("ours, head", f"ours, head, {FOUR_METRICS}"), library)
        yield Work("four-metrics", of_model("train", "metrics", batch=16, backend=library), peers)


def accuracy() -> Iterator[Work]:
    """The errors of outputs and of their gradients, and those that the rounding of the logits alone makes."""
    peers = OURS | {"Keras, graph": "tensorflow", "float64 after the logits": "tensorflow"}
    for output in "log_prob", "entropy", "logsumexp":
        case = case_of("accuracy", SMALL_MODEL, output=output)
        yield Work("accuracy", case, peers, "error")


ROWS = {
    "statistics": lambda: times("statistics"),
    "statistics-memory": lambda: memory("statistics"),
    "four-metrics": four_metrics,
    "dpo": lambda: times("dpo"),
    "dpo-memory": lambda: memory("dpo"),
    "distillation": lambda: times("distillation"),
    "distillation-memory": lambda: memory("distillation"),
    "likeliest": lambda: times("likeliest"),
    "likeliest-memory": lambda: memory("likeliest"),
    "top-k": lambda: times("top_k"),
    "top-k-memory": lambda: memory("top_k"),
    "lora-memory": low_rank,
    "score": lambda: scores("milliseconds"),
    "score-memory": lambda: scores("megabytes"),
    "accuracy": accuracy,
}
