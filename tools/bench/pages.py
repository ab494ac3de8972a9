"""The pages that show figures: what stands between `<!-- bench: NAME -->` and `<!-- /bench -->` is made here."""

import re
from statistics import median

from tools.bench import bars, tables
from tools.bench import results as _results
from tools.bench.rows import ROUNDS
from tools.bench.shapes import LANGUAGE_MODEL
from tools.bench.workers import ROOT

RESULTS = ROOT / "docs" / "performance.json"
PAGES = (ROOT / "README.md", ROOT / "docs" / "performance.md")
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


def _headline(results):
    lines = ["| forward and backward on a CPU | | times ours |", "|---|--:|--:|"]
    found = _results.find(results, "sparse", shape=LANGUAGE_MODEL.name, dtype="float32", smoothing=0.0)
    for record in found:
        ours = median(record["values"]["ours"])
        shape = f"[{LANGUAGE_MODEL.rows}, {LANGUAGE_MODEL.classes}]"
        lines.append(f"| sparse labels, logits {shape}: `keras_xent` | {ours:.3g} ms | 1 |")
        for said, name in _SAID:
            times = _results.ratio(record, name, "ours")
            if times is not None:
                lines.append(f"| {said} | {median(record['values'][name]):.3g} ms | {times:.1f} |")
    for record in _results.find(results, "fit-memory", jit=False):
        times = _results.ratio(record, "Keras", "ours, head")
        if times is not None:
            name = {"tensorflow": "TensorFlow", "jax": "JAX"}[record["case"]["backend"]]
            ours, theirs = (record["values"][peer][0] for peer in ("ours, head", "Keras"))
            lines.append(
                f"| memory of a step of `fit`, 8192 tokens, 32,000 classes, {name}: `LogitsDense` | {ours:.0f} MB | 1 |"
            )
            lines.append(f"| `Dense` and Keras' loss | {theirs:.0f} MB | {times:.1f} |")
    hurry = _in_a_hurry(found).strip()
    return "\n".join(lines + ["", hurry] if hurry else lines) if len(lines) > 2 else "Not measured yet."


BLOCKS = {"machine": _machine, "headline": _headline, "bars": bars.table, "faster": tables.faster}
