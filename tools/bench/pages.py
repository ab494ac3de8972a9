"""The pages that show figures: what stands between `<!-- bench: NAME -->` and `<!-- /bench -->` is made here."""

import functools
import re
from statistics import median

from tools.bench import bars, tables
from tools.bench import results as _results
from tools.bench.rows import ROUNDS
from tools.bench.workers import ROOT

RESULTS = ROOT / "docs" / "performance.json"
PAGES = tuple(ROOT / page for page in ("README.md", "docs/performance.md", "docs/performance-tables.md"))
_BLOCK = re.compile(r"(<!-- bench: (\S+) -->\n).*?(<!-- /bench -->)", re.DOTALL)


def write(results: dict) -> None:
    """Keeps the results where the pages are, and writes them into the pages."""
    _results.write(results, RESULTS)
    for page in PAGES:
        page.write_text(filled(page.read_text(), results))


def filled(page: str, results: dict) -> str:
    """The page with the figures of these results."""
    return _BLOCK.sub(lambda found: f"{found[1]}{block(found[2], results)}\n{found[3]}", page)


def block(name: str, results: dict) -> str:
    """Returns the text between two marks: one of the named blocks, or the table of a row."""
    return BLOCKS[name](results) if name in BLOCKS else tables.table(results, name)


def _machine(results):
    text = tables.machine(results) + _in_a_hurry(results["rows"])
    awake = [record["awake"] for record in results["rows"] if record.get("awake") is not None]
    if awake:
        text += f" While one process was timed, the others took {max(awake):.1%} of a processor at most."
    return text


def _in_a_hurry(records):
    few = any(record["rounds"] < ROUNDS for record in records if record["unit"] == "milliseconds")
    return " **Measured with `--quick`: only the order of the figures means something.**" if few else ""


def _times_ours(record, name, ours="ours"):
    """The ratio of the medians, so that the figures of a line divide."""
    values = record["values"]
    return median(values[name]) / median(values[ours]) if values.get(name) and values.get(ours) else None


# The lines of a short table: row, case, the peer and ours, and what is said of them.
_SPARSE = {"dtype": "float32", "smoothing": 0.0}
_LARGE, _SMALL = _SPARSE | {"rows": 2048}, _SPARSE | {"rows": 65536}
_HEAD = {"rows": 2048, "classes": 32_000}
_FIT = {"jit": False, "valid": 1.0, "backend": "tensorflow"}
_SUMMARY = (
    ("sparse", _LARGE, "Keras, graph", "ours", "sparse loss, logits [2048, 32000]; Keras in a graph"),
    ("sparse", _LARGE, "Keras, XLA", "ours", "the same; Keras under XLA"),
    ("sparse", _SMALL, "Keras, graph", "ours", "sparse loss, logits [65536, 10]; Keras in a graph"),
    ("sparse", _SMALL, "Keras, XLA", "ours, XLA", "the same, both under XLA"),
    ("linear", _HEAD | {"valid": 1.0}, "Keras, graph", "ours", "head and loss, 2048 tokens, 32,000 classes; Keras"),
    ("linear", _HEAD | {"valid": 0.15}, "Keras, graph", "ours", "the same, 15 % of the tokens valid"),
    ("fit", _FIT, "Keras", "ours, head", "step of `fit`, 8192 tokens, 32,000 classes; `Dense` and Keras' loss"),
    ("fit-memory", _FIT, "Keras", "ours, head", "its memory"),
    ("fit", _FIT | {"backend": "jax"}, "Keras", "ours, head", "the step on JAX"),
    ("first-step", {"loss": "sparse"}, "Keras, graph", "ours", "first batch of a new shape; Keras in a graph"),
)
_LOGITS = "loss and gradient, sparse labels, logits [2048, 32000]"
_HEADLINE = (
    ("sparse", _LARGE, "Keras, graph", "ours", f"{_LOGITS}; Keras in a graph, as `fit` runs it"),
    ("sparse", _LARGE, "Keras, XLA", "ours", "the same; Keras under `jit_compile=True`"),
    ("sparse", _LARGE, "torch.compile", "ours", "the same; `torch.compile`"),
    ("sparse", _LARGE, "optax", "ours", "the same; optax under `jax.jit`"),
    (
        "fit-memory",
        _FIT,
        "Keras",
        "ours, head",
        "peak memory of `fit`, masked loss of 8192 tokens, 32,000 classes; `Dense` and Keras' sparse loss",
    ),
    ("fit-memory", _FIT | {"backend": "jax"}, "Keras", "ours, head", "the same on JAX"),
)
_UNITS = {"milliseconds": "ms", "megabytes": "MB"}


def _short(results, wanted):
    """A line for each of the cases that were measured."""
    lines = ["| on a CPU | keras_xent | the other | the other / keras_xent |", "|---|--:|--:|--:|"]
    found = []
    for row, case, name, ours, said in wanted:
        for record in _results.find(results, row, **case)[:1]:
            times = _times_ours(record, name, ours)
            if times is not None:
                unit = _UNITS[record["unit"]]
                both = (f"{_rounded(median(record['values'][peer]))} {unit}" for peer in (ours, name))
                lines.append(f"| {said} | {' | '.join(both)} | {times:.2g} |")
                found.append(record)
    hurry = _in_a_hurry(found).strip()
    return "\n".join([*lines, *(["", hurry] if hurry else [])]) if found else "Not measured yet."


def _rounded(number):
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


BLOCKS = {
    "machine": _machine,
    "headline": functools.partial(_short, wanted=_HEADLINE),
    "summary": functools.partial(_short, wanted=_SUMMARY),
    "bars": bars.table,
    "faster": tables.faster,
}
