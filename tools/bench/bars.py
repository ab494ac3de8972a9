"""Targets of the benchmarks, and whether the figures meet them."""

from statistics import median

from tools.bench import bars_of_outputs
from tools.bench.bar import Bar, times, worst
from tools.bench.results import find, ratio
from tools.bench.shapes import GEMMA2, HEADS, LANGUAGE_MODEL, SHAPES, SMALL_MODEL, VALID


def _every_head(results):
    """Of the best of the others over ours the worst; None until all heads and shares are there."""
    whole = len(find(results, "linear")) == len(HEADS) * len(VALID)
    return worst("linear", _RIVALS, "ours", min)(results) if whole else None


def _first_step(results):
    """The first step of a whole model: the trace and the compilation of everything in it."""
    records = find(results, "transformer", jit=True)
    first = records[0].get("first", {}) if records else {}
    return first["ours"] / first["Keras"] if {"ours", "Keras"} <= first.keys() else None


def _halves(results):
    """bfloat16 over float32: two records of one run."""
    both = [find(results, "sparse", shape=LANGUAGE_MODEL.name, dtype=d, smoothing=0.0) for d in ("bfloat16", "float32")]
    if not all(both):
        return None
    return median(both[0][0]["values"]["ours"]) / median(both[1][0]["values"]["ours"])


def _gemma(results):
    """The peak, with the kernel that was there before, over 1.25 times the kernel and its gradient and 256 MB."""
    records = find(results, "gemma")
    if not records or "ours" not in records[0]["values"]:
        return None
    kernel = 4 * GEMMA2.features * GEMMA2.classes / 1e6
    return (records[0]["values"]["ours"][0] + kernel) / (2 * kernel * 1.25 + 256)


def _per_shape(results):
    records = find(results, "compilations")
    return records[0]["values"]["ours, XLA"][0] / len(records[0]["case"]["lengths"]) if records else None


def _programs(results):
    records = find(results, "compilations", classes=500)
    return records[0]["values"]["ours"][0] if records else None


def _grown(results):
    records = find(results, "many-shapes")
    return records[0]["values"]["ours"][0] / 1e3 if records else None


def _behind(ours, others, *, shapes=SHAPES, **case):
    """How many times the best of the others `ours` takes, in the worst case of three losses and of these shapes."""
    names = {shape.name for shape in shapes}

    def number(results):
        records = [
            record
            for row in ("sparse", "dense", "sigmoid")
            for record in find(results, row, smoothing=0.0, **case)
            if record["case"]["shape"] in names
        ]
        ratios = [ratio(record, ours, other) for record in records for other in others]
        return max((value for value in ratios if value is not None), default=None)

    return number


def _most_operations(results):
    counts = [record["values"]["ours"][0] for record in find(results, "graph") if "ours" in record["values"]]
    return max(counts, default=None)


_SPARSE = {"shape": LANGUAGE_MODEL.name, "dtype": "float32", "smoothing": 0.0}
_FEW = [shape for shape in SHAPES if shape.classes <= 1000]
_HEAD = {"shape": SMALL_MODEL.name, "valid": 1.0}
_FIT = {"jit": False, "valid": 1.0, "backend": "tensorflow"}
_JAX = {"jit": False, "valid": 1.0, "backend": "jax"}
_LINEAR = ("PyTorch linear", "PyTorch linear, chunked")
_RIVALS = ("Keras, graph", "Keras, XLA", "PyTorch", "torch.compile", *_LINEAR, "optax")
_BOTH = "ours, head, Perplexity, TokenAccuracy"

BARS = (
    Bar("sparse: Keras in a graph / ours", ">= 3", times("sparse", "Keras, graph", "ours", **_SPARSE)),
    Bar("sparse: Keras under XLA / ours", ">= 1.6", times("sparse", "Keras, XLA", "ours", **_SPARSE)),
    Bar("sparse: PyTorch / ours", ">= 3", times("sparse", "PyTorch", "ours", **_SPARSE)),
    Bar("sparse: torch.compile / ours", ">= 2", times("sparse", "torch.compile", "ours", **_SPARSE)),
    Bar("sparse: optax / ours", ">= 2", times("sparse", "optax", "ours", **_SPARSE)),
    Bar("sparse: ours / the memory traffic alone", "<= 1.6", times("sparse", "ours", "floor", **_SPARSE)),
    Bar("sparse: ours with bfloat16 logits / with float32 logits", "<= 1", _halves),
    Bar("head: ours / its three matmuls alone", "<= 1.25", times("linear", "ours", "floor", **_HEAD)),
    Bar(
        "head: PyTorch linear_cross_entropy, the faster / ours",
        ">= 1.5",
        worst("linear", _LINEAR, "ours", min, **_HEAD),
    ),
    Bar(
        f"head: the best of Keras, PyTorch and optax / ours, the worst of {len(HEADS)} shapes and of the valid shares",
        ">= 1",
        _every_head,
    ),
    Bar(
        "head, memory: PyTorch linear_cross_entropy, the smaller / ours",
        ">= 1",
        worst("vocabulary", _LINEAR, "ours", min, shape=SMALL_MODEL.name),
    ),
    Bar("head of Gemma 2, memory: ours / (kernel and its gradient) * 1.25 + 256 MB", "<= 1", _gemma),
    Bar(
        "head, evaluation: ours / the logits and the pass over them",
        "<= 1.05",
        times("evaluate", "ours", "ours, logits, XLA"),
    ),
    Bar("fit, graph: ours / Dense and Keras' loss", "<= 0.85", times("fit", "ours, head", "Keras", **_FIT)),
    Bar(
        "fit, XLA: ours / Dense and Keras' loss",
        "<= 1",
        times("fit", "ours, head", "Keras", jit=True, valid=1.0, backend="tensorflow"),
    ),
    Bar("fit, graph, 15 % valid: the same", "<= 0.45", times("fit", "ours, head", "Keras", **{**_FIT, "valid": 0.15})),
    Bar("fit, graph, memory: the same", "<= 0.25", times("fit-memory", "ours, head", "Keras", **_FIT)),
    Bar("fit, JAX: the same", "<= 0.5", times("fit", "ours, head", "Keras", **_JAX)),
    Bar("fit, JAX, memory: the same", "<= 0.1", times("fit-memory", "ours, head", "Keras", **_JAX)),
    Bar(
        "a step with Perplexity and TokenAccuracy / without, the worse of two backends",
        "<= 1.03",
        worst("metrics", (_BOTH,), "ours, head", max),
    ),
    Bar(
        "transformer, our loss and metrics / Keras' loss and no metric, the worse of graph and XLA",
        "<= 1",
        worst("transformer", ("ours, Perplexity, TokenAccuracy",), "Keras", max),
    ),
    Bar("first step of the transformer under XLA: our loss / Keras'", "<= 1.2", _first_step),
    Bar(
        "first step under XLA of the loss alone: ours / Keras', the worst of three losses",
        "<= 1.2",
        worst("first-step", ("ours, XLA",), "Keras, XLA", max),
    ),
    Bar(
        "fit, first epoch of 60 batch lengths: ours / Keras', the worse of the sparse loss and a head",
        "<= 4",
        worst("first-epoch", ("ours",), "Keras", max),
    ),
    Bar("losses, up to 1000 classes, graph: ours / Keras'", "<= 1", _behind("ours", ("Keras, graph",), shapes=_FEW)),
    Bar(
        "losses, up to 1000 classes, XLA: ours / the best of Keras, optax and torch.compile",
        "<= 1.1",
        _behind("ours, XLA", ("Keras, XLA", "optax", "torch.compile"), shapes=_FEW),
    ),
    Bar("losses on JAX, float32: ours / optax", "<= 1", _behind("ours, JAX", ("optax",), dtype="float32")),
    Bar(
        "fit, later epochs of 60 batch lengths: ours / Keras', the worse of the sparse loss and a head",
        "<= 1.1",
        worst("later-epoch", ("ours",), "Keras", max),
    ),
    Bar("programs compiled for these 60 lengths", "<= 12", _programs),
    Bar(
        "first call of a graph: ours / Keras', the worst of three losses",
        "<= 8",
        worst("first-call", ("ours",), "Keras, graph", max),
    ),
    Bar(
        "150 numbers of rows left by a mask: ours / Keras', compilation included",
        "<= 5",
        worst("uneven", ("ours",), "Keras, graph", max),
    ),
    Bar("memory after 500 numbers of rows, GB", "<= 1", _grown),
    Bar("eager loss and gradient: ours / Keras', the worst", "<= 2", worst("eager", ("ours",), "Keras", max)),
    Bar("operations in the graph of loss and gradient", "<= 120", _most_operations),
    Bar(
        "first value and gradient: a second process / the first, the worse of two backends",
        "<= 0.4",
        worst("second-process", ("ours, second process",), "ours, first process", max),
    ),
    Bar("compilations for each shape under XLA", "<= 1", _per_shape),
    *bars_of_outputs.BARS,
)


def table(results: dict) -> str:
    """Every bar, what was measured, and whether it is met."""
    lines = ["| bar | bound | measured | met |", "|---|--:|--:|---|"]
    for bar in BARS:
        number = bar.number(results)
        shown = "–" if number is None else f"{number:.2f}"
        lines.append(
            f"| {bar.text} | {bar.bound.replace('>=', '≥').replace('<=', '≤')} | {shown} | {bar.met(number)} |"
        )
    return "\n".join(lines)
