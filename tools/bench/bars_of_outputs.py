"""Targets of what a head gives beside its loss."""

from collections.abc import Callable, Iterator
from statistics import median

from tools.bench.bar import Bar, times
from tools.bench.results import find, ratio
from tools.bench.rows_of_outputs import FOUR_METRICS, STATISTICS

_CHUNKED = "PyTorch linear, chunked"


def _over_best(row: str, ours: str, others: tuple[str, ...]) -> Callable[[dict], float | None]:
    """The ratio of ours to the best of the others, in the only record of a row."""

    def number(results):
        ratios = [ratio(record, ours, other) for record in find(results, row) for other in others]
        return max((value for value in ratios if value is not None), default=None)

    return number


def _errors(peer: str) -> Callable[[dict], float | None]:
    """The largest error of all outputs, in millionths."""

    def number(results):
        errors = [median(record["values"][peer]) for record in find(results, "accuracy") if record["values"].get(peer)]
        return 1e6 * max(errors) if errors else None

    return number


def _of_dense_logits(text: str, row: str, time: str, memory: str) -> Iterator[Bar]:
    """Time and memory of a step on each backend, beside the same through dense logits."""
    for ours, others, where in (
        ("ours", ("Keras, graph", "Keras, XLA"), "the better of graph and XLA"),
        ("ours, JAX", ("Keras, JAX",), "JAX"),
    ):
        yield Bar(f"{text}: ours / through dense logits, {where}", time, _over_best(row, ours, others))
        yield Bar(f"{text}, memory: the same", memory, _over_best(f"{row}-memory", ours, others))


def _beside(text: str, row: str, over: str, under: str, time: str, memory: str) -> Iterator[Bar]:
    """Time and memory of a step on each backend, beside another of ours. `over` and `under` follow "ours, JAX"."""
    for ours, where in ("ours", ""), ("ours, JAX", ", JAX"):
        yield Bar(f"{text}{where}", time, times(row, ours + over, ours + under))
        yield Bar(f"{text}, memory{where}", memory, times(f"{row}-memory", ours + over, ours + under))


def _on_each_backend() -> Iterator[Bar]:
    for backend, where in ("tensorflow", ""), ("jax", ", JAX"):
        yield Bar(
            f"fit with entropy, calibration and two perplexities / without{where}",
            "<= 1.05",
            times("four-metrics", f"ours, head, {FOUR_METRICS}", "ours, head", backend=backend),
        )
        yield Bar(
            f"log-probabilities of a KerasHub model, memory: ours / its score(){where}",
            "<= 0.1",
            times("score-memory", "ours", "KerasHub", backend=backend),
        )
    for peer, where in ("ours", ""), ("ours, JAX", ", JAX"):
        yield Bar(f"largest error of three outputs and their gradients, in millionths{where}", "<= 1", _errors(peer))
        for classes in 32_000, 131_072:
            number = times("vocabulary", _CHUNKED, peer, classes=classes)
            yield Bar(f"head, {classes:,} classes, memory: PyTorch's chunks / ours{where}", ">= 1", number)


BARS = (
    *_beside("loss with entropy and log-sum-exp / without", "statistics", f", {STATISTICS}", "", "<= 1.03", "<= 1.03"),
    *_of_dense_logits("DPO", "dpo", "<= 1", "<= 0.25"),
    *_of_dense_logits("distillation", "distillation", "<= 1", "<= 0.2"),
    Bar("distillation: ours / its four matmuls alone", "<= 1.2", times("distillation", "ours", "floor")),
    *_beside("distillation of 64 classes / the loss of labels", "top-k", "", ", labels", "<= 1.15", "<= 1.15"),
    Bar("LoRA on Gemma 2's head, memory: two factors / all", "<= 0.35", times("lora-memory", "ours, LoRA", "ours")),
    Bar("the same: only hidden states / all", "<= 0.35", times("lora-memory", "ours, frozen", "ours")),
    *_on_each_backend(),
)
