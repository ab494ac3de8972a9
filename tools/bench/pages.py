"""The pages that show figures: what stands between `<!-- bench: NAME -->` and `<!-- /bench -->` is made here."""

import re
from statistics import median

from tools.bench import bars, tables
from tools.bench import results as _results
from tools.bench.rows import ROUNDS
from tools.bench.shapes import LANGUAGE_MODEL
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
    """What is between two marks: one of the named blocks, or the table of a row."""
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


# What the README says of each peer, and how the peer is called here.
_SAID = (
    ("Keras in a graph, as `fit` runs it on a CPU", "Keras, graph"),
    ("Keras under `jit_compile=True`", "Keras, XLA"),
    ("PyTorch", "PyTorch"),
    ("`torch.compile`", "torch.compile"),
    ("optax under `jax.jit`", "optax"),
)


def _times_ours(record, name, ours="ours"):
    """The ratio of the medians, so that the figures of a line divide."""
    values = record["values"]
    return median(values[name]) / median(values[ours]) if values.get(name) and values.get(ours) else None


def _headline(results):
    lines = ["| on a CPU | median | times ours |", "|---|--:|--:|"]
    found = _results.find(results, "sparse", shape=LANGUAGE_MODEL.name, dtype="float32", smoothing=0.0)
    for record in found:
        ours = median(record["values"]["ours"])
        shape = f"[{LANGUAGE_MODEL.rows}, {LANGUAGE_MODEL.classes}]"
        lines.append(f"| loss and gradient, sparse labels, logits {shape}: `keras_xent` | {ours:.3g} ms | 1 |")
        for said, name in _SAID:
            times = _times_ours(record, name)
            if times is not None:
                lines.append(f"| {said} | {median(record['values'][name]):.3g} ms | {times:.1f} |")
    for record in _results.find(results, "fit-memory", jit=False):
        times = _times_ours(record, "Keras", "ours, head")
        if times is not None:
            name = {"tensorflow": "TensorFlow", "jax": "JAX"}[record["case"]["backend"]]
            ours, theirs = (record["values"][peer][0] for peer in ("ours, head", "Keras"))
            lines.append(
                f"| peak memory of `fit`, 8192 tokens, 32,000 classes, {name}: `LogitsDense` | {ours:.0f} MB | 1 |"
            )
            lines.append(f"| the same with `Dense` and Keras' loss | {theirs:.0f} MB | {times:.1f} |")
    hurry = _in_a_hurry(found).strip()
    return "\n".join(lines + ["", hurry] if hurry else lines) if len(lines) > 2 else "Not measured yet."


# The lines of docs/performance.md: row, case, the peer and ours, and what is said of them.
_SPARSE = {"dtype": "float32", "smoothing": 0.0}
_HEAD = {"rows": 2048, "classes": 32_000}
_FIT = {"jit": False, "valid": 1.0, "backend": "tensorflow"}
_SUMMARY = (
    (
        "sparse",
        _SPARSE | {"rows": 2048},
        "Keras, graph",
        "ours",
        "sparse loss, logits [2048, 32000] / Keras in a graph",
    ),
    ("sparse", _SPARSE | {"rows": 2048}, "Keras, XLA", "ours", "the same / Keras under XLA"),
    ("sparse", _SPARSE | {"rows": 65536}, "Keras, graph", "ours", "sparse loss, logits [65536, 10] / Keras in a graph"),
    ("sparse", _SPARSE | {"rows": 65536}, "Keras, XLA", "ours, XLA", "the same, both under XLA"),
    ("linear", _HEAD | {"valid": 1.0}, "Keras, graph", "ours", "head and loss, 2048 tokens, 32,000 classes / Keras"),
    ("linear", _HEAD | {"valid": 0.15}, "Keras, graph", "ours", "the same, 15 % of the tokens valid"),
    ("fit", _FIT, "Keras", "ours, head", "step of `fit`, 8192 tokens, 32,000 classes / `Dense` and Keras' loss"),
    ("fit-memory", _FIT, "Keras", "ours, head", "its memory"),
    ("fit", _FIT | {"backend": "jax"}, "Keras", "ours, head", "the step on JAX"),
    (
        "first-step",
        {"loss": "sparse"},
        "Keras, graph",
        "ours",
        "first batch of a new shape, sparse loss / Keras in a graph",
    ),
)
_UNITS = {"milliseconds": "ms", "megabytes": "MB"}


def _summary(results):
    lines = ["| ours / theirs, on a CPU | ours | theirs | theirs : ours |", "|---|--:|--:|--:|"]
    for row, case, name, ours, said in _SUMMARY:
        for record in _results.find(results, row, **case)[:1]:
            times = _times_ours(record, name, ours)
            if times is not None:
                unit = _UNITS[record["unit"]]
                both = (f"{_rounded(median(record['values'][peer]))} {unit}" for peer in (ours, name))
                lines.append(f"| {said} | {' | '.join(both)} | {times:.2g} |")
    return "\n".join(lines) if len(lines) > 2 else "Not measured yet."


def _rounded(number):
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


BLOCKS = {
    "machine": _machine,
    "headline": _headline,
    "summary": _summary,
    "bars": bars.table,
    "faster": tables.faster,
}
