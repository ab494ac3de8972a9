"""The pages that show figures: what stands between `<!-- bench: NAME -->` and `<!-- /bench -->` is made here."""

import functools
import re
import textwrap
from statistics import median
from typing import NamedTuple

from tools.bench import bars, rows, rows_of_gpu, tables
from tools.bench import results as _results
from tools.bench.shapes import SMALL_MODEL
from tools.bench.workers import ROOT

RESULTS, GPU_RESULTS = (ROOT / "docs" / name for name in ("performance.json", "performance-gpu.json"))
TABLES = ROOT / "docs" / "performance-tables.md"
PAGES = (ROOT / "README.md", ROOT / "docs" / "performance.md", TABLES, ROOT / "docs" / "performance-targets.md")
# Ratios from here to 1 are ties.
_TIE = 0.97
_BLOCK = re.compile(r"(<!-- bench: (\S+) -->\n).*?(<!-- /bench -->)", re.DOTALL)


def write(results: dict) -> None:
    """Keeps the results where the pages are, and writes them into the pages."""
    of_gpu = "GPU" in results["machine"]
    _results.write(results, GPU_RESULTS if of_gpu else RESULTS)
    for page in PAGES:
        page.write_text(filled(page.read_text(), _results.read(RESULTS) if of_gpu else results))


def filled(page: str, results: dict) -> str:
    """The page with the figures of these results, and in blocks named gpu-... those kept of a GPU."""

    def text(found):
        name = found[2]
        return (
            f"{found[1]}{block(name, _results.read(GPU_RESULTS) if name.startswith('gpu-') else results)}\n{found[3]}"
        )

    return _BLOCK.sub(text, page)


def block(name: str, results: dict) -> str:
    """Returns the text between two marks: one of the named blocks, or the table of a row and what it lacks."""
    return BLOCKS[name](results) if name in BLOCKS else tables.table(results, name) + _not_measured(results, name)


def _not_measured(results, row):
    """Names the cases of a row that the results do not have, as where ours gave a wrong result."""
    works = [work for make in (rows.ROWS | rows_of_gpu.ROWS).values() for work in make() if work.row == row]
    missing = [work.case for work in works if not _results.has(results, row, work.case, work.unit, rounds=1)]
    if not missing or len(missing) == len(works):
        return ""
    return f"\n\nNot measured: {'; '.join(', '.join(tables.about(case).values()) for case in missing)}."


def _machine(results):
    text = tables.machine(results) + _in_a_hurry(results["rows"])
    awake = [record["awake"] for record in results["rows"] if record.get("awake") is not None]
    if awake:
        text += f" While one process was timed, the others took {max(awake):.1%} of a processor at most."
    return text


def _in_a_hurry(records):
    few = any(record["rounds"] < rows.ROUNDS for record in records if record["unit"] == "milliseconds")
    return " Measured with `--quick`, in three rounds: differences below a fifth mean little." if few else ""


class Line(NamedTuple):
    """A line of a short table: what is timed, against whom, and why another is faster where one is."""

    row: str
    case: dict
    other: str
    ours: str
    what: str
    against: str
    why: str = ""


_SPARSE = {"dtype": "float32", "smoothing": 0.0}
_LARGE, _SMALL = _SPARSE | {"rows": 2048}, _SPARSE | {"rows": 65536}
_HEAD = {"rows": 2048, "classes": 32_000}
_FIT = {"jit": False, "valid": 1.0, "backend": "tensorflow"}
_LOGITS, _DIGITS = "sparse loss and gradient, logits [2048, 32000]", "sparse loss and gradient, logits [65536, 10]"
_BATCH, _FIXED = "sparse loss and gradient, logits [32, 10]", "a call of a compiled program costs some 30 microseconds"
_DENSE, _BINARY = "dense targets [65536, 10]", "binary labels [65536, 10]"
_OF_HEAD = "output layer, sparse loss and gradients; 2048 tokens, 32,000 classes"
_OF_FIT = "8192 tokens, 32,000 classes"
_FEW_TOKENS = "chunks of few tokens, to need less memory: each reads the kernel and adds to its gradient"
_ONE_PROGRAM = "few classes: a program of its own, with checks of the labels"
_EXACT = "few classes: the loss of confident rows is exact here, and rounds to 0 there"
_LINES = (
    Line("sparse", _LARGE, "Keras, graph", "ours", _LOGITS, "Keras in a graph, as `fit` runs it on a CPU"),
    Line("sparse", _LARGE, "Keras, XLA", "ours", _LOGITS, "Keras under `jit_compile=True`"),
    Line("sparse", _LARGE, "torch.compile", "ours", _LOGITS, "`torch.compile`"),
    Line(
        "sparse",
        _LARGE,
        "optax",
        "ours, JAX",
        f"{_LOGITS}, both on JAX",
        "optax under `jax.jit`",
        "exact sums stay out of fused loops",
    ),
    Line("sparse", _SMALL, "Keras, graph", "ours", _DIGITS, "Keras in a graph", _ONE_PROGRAM),
    Line("sparse", _SMALL, "Keras, XLA", "ours, XLA", _DIGITS, "Keras, both under `jit_compile=True`", _EXACT),
    Line("sparse", _SMALL, "torch.compile", "ours", _DIGITS, "`torch.compile`", _ONE_PROGRAM),
    Line("sparse", _SMALL, "optax", "ours, JAX", f"{_DIGITS}, both on JAX", "optax", _EXACT),
    Line("sparse", _SPARSE | {"rows": 32}, "Keras, graph", "ours", _BATCH, "Keras in a graph", _FIXED),
    Line("dense", _SMALL, "Keras, graph", "ours", _DENSE, "Keras in a graph", _EXACT),
    Line("dense", _SMALL, "Keras, XLA", "ours, XLA", _DENSE, "Keras, both under `jit_compile=True`", _EXACT),
    Line("sigmoid", _SMALL, "Keras, graph", "ours", _BINARY, "Keras in a graph", "labels are checked to be in [0, 1]"),
    Line("linear", _HEAD | {"valid": 1.0}, "Keras, graph", "ours", _OF_HEAD, "`Dense` and Keras' loss", _FEW_TOKENS),
    Line(
        "linear", _HEAD | {"valid": 0.15}, "Keras, graph", "ours", f"{_OF_HEAD}, 15 % valid", "`Dense` and Keras' loss"
    ),
    Line("fit", _FIT, "Keras", "ours, head", f"step of `fit`, {_OF_FIT}", "`Dense` and Keras' loss"),
    Line("fit", _FIT | {"backend": "jax"}, "Keras", "ours, head", f"step of `fit` on JAX, {_OF_FIT}", "the same"),
    Line("fit-memory", _FIT, "Keras", "ours, head", f"peak memory of `fit`, {_OF_FIT}", "`Dense` and Keras' loss"),
    Line(
        "fit-memory",
        _FIT | {"backend": "jax"},
        "Keras",
        "ours, head",
        f"peak memory of `fit` on JAX, {_OF_FIT}",
        "the same",
    ),
    Line(
        "vocabulary",
        {"shape": SMALL_MODEL.name},
        "PyTorch linear, chunked",
        "ours",
        "peak memory of output layer and loss, 2048 tokens, 32,000 classes",
        "PyTorch's chunked `linear_cross_entropy`",
        "its chunks are smaller, which takes it more time; XLA's compiler is in the other figure",
    ),
    Line(
        "callbacks",
        {"backend": "jax"},
        "Keras' TensorBoard, every batch",
        "TensorBoard, every batch",
        "a small step on JAX that is logged every batch",
        "Keras' `TensorBoard`",
        "more values are written",
    ),
    Line(
        "first-epoch",
        {"head": False},
        "Keras",
        "ours",
        "first epoch of 60 batch sizes, 500 classes",
        "Keras' loss",
        "sizes are rounded up, and the few that remain are compiled",
    ),
    Line(
        "first-call",
        {"loss": "sparse"},
        "Keras, graph",
        "ours",
        "first call of a graph",
        "Keras in a graph",
        "a program is compiled, and Keras compiles none",
    ),
    Line(
        "first-step",
        {"loss": "sparse", "rows": "new"},
        "Keras, graph",
        "ours",
        "first batch of a new size, for which there is a program",
        "Keras in a graph",
        "rows are added up to the size of the program",
    ),
    Line(
        "uneven",
        {},
        "Keras, graph",
        "ours",
        "150 steps with 150 numbers of rows, the first call among them",
        "Keras in a graph",
        "a program is compiled, and Keras compiles none",
    ),
    Line(
        "memory",
        {"loss": "sparse"},
        "Keras, graph",
        "ours",
        "peak memory of sparse loss and gradient, logits [2048, 32000]",
        "Keras in a graph",
        "XLA's compiler is in the figure",
    ),
)
_HEADLINE = tuple(line for line in _LINES if line.row == "fit-memory" or line.row == "sparse" and line.case is _LARGE)
# What the short table of a GPU has, and whom it compares.
_ON_GPU = (
    ("gpu-linear", {"classes": 32_000, "valid": 1.0}, "8192 tokens, 2048 features, 32,000 classes"),
    ("gpu-memory", {"classes": 32_000}, "its memory"),
    ("gpu-linear", {"valid": 0.15}, "the same, 15 % of the labels valid"),
    ("gpu-linear", {"classes": 128_256}, "4096 tokens, 4096 features, 128,256 classes"),
    ("gpu-memory", {"classes": 128_256}, "its memory"),
    ("gpu-sparse", _SPARSE | {"rows": 4096, "classes": 32_000}, "sparse loss, float32 logits [4096, 32000]"),
)
_PEERS_ON_GPU = ("ours", "optax", "PyTorch", "torch.compile", "Liger")
_UNITS = {"milliseconds": "ms", "megabytes": "MB"}


def _measured(results, lines):
    """Yields each line whose case was measured, its record, and the other's median over ours."""
    for line in lines:
        for record in _results.find(results, line.row, **line.case)[:1]:
            values = record["values"]
            if values.get(line.other) and values.get(line.ours):
                yield line, record, median(values[line.other]) / median(values[line.ours])


def _short(results, lines):
    """A line for each case; the ratio is that of the medians, so that the figures of a line divide."""
    found = list(_measured(results, lines))
    heading = "| on a CPU | compared with | keras_xent | the other | the other / keras_xent |\n|---|---|--:|--:|--:|"
    return _table(heading, found, lambda times: times) if found else "Not measured yet."


def _better(results):
    """Where keras_xent needs less than the other, or as much."""
    return _short(results, [line for line, _, times in _measured(results, _LINES) if times >= _TIE])


def _worse(results):
    """Where the other needs less, and why."""
    found = [one for one in _measured(results, _LINES) if one[2] < _TIE]
    heading = "| on a CPU | compared with | keras_xent | the other | keras_xent / the other | why |\n"
    heading += "|---|---|--:|--:|--:|---|"
    return _table(heading, found, lambda times: 1 / times, why=True) if found else "None of the cases above."


def _table(heading, found, ratio, why=False):
    lines, before = [heading], None
    for line, record, times in found:
        unit = _UNITS[record["unit"]]
        both = [f"{tables.number(median(record['values'][name]))} {unit}" for name in (line.ours, line.other)]
        what = "the same" if line.what == before else line.what
        cells = [what, line.against, *both, tables.number(ratio(times), 2), *([line.why] if why else [])]
        lines.append(f"| {' | '.join(cells)} |")
        before = line.what
    hurry = _in_a_hurry([record for _, record, _ in found]).strip()
    return "\n".join([*lines, *(["", hurry] if hurry else [])])


def _gpu_short(results):
    """A line for each case of a GPU, a column for each library."""
    lines = [
        f"| on a GPU | GPU | {' | '.join(map(tables.named, _PEERS_ON_GPU))} |",
        "|---|---" + "|--:" * len(_PEERS_ON_GPU) + "|",
    ]
    for row, case, what in _ON_GPU:
        for record in _results.find(results, row, **case)[:1]:
            unit = _UNITS[record["unit"]]
            figures = [f"{tables.number(median(record['values'][name]), 2)} {unit}" for name in _PEERS_ON_GPU]
            lines.append(f"| {' | '.join([what, tables.gpu(results, record), *figures])} |")
    return "\n".join(lines)


def _gpu_sentence(results):
    """The large head on a GPU, in words."""
    case = {"classes": 32_000, "valid": 1.0}
    head = [_results.find(results, row, **case)[0] for row in ("gpu-linear", "gpu-memory")]
    dpo = [_results.find(results, row, question="dpo")[0] for row in ("gpu-outputs", "gpu-outputs-memory")]

    def figures(name, records=head):
        milliseconds, megabytes = (median(record["values"][name]) for record in records)
        return f"{tables.number(milliseconds, 2)} ms and {tables.number(megabytes)} MB"

    gpu = tables.gpu(results, head[0])
    return textwrap.fill(
        f"On a GPU ({gpu}, JAX, bfloat16), an output layer of 2048 features and 32,000 classes with its loss and "
        f"gradients, for 8192 tokens, takes {figures('ours')}; with optax {figures('optax')}, with PyTorch "
        f"{figures('PyTorch')}, with `torch.compile` {figures('torch.compile')}. The loss of DPO takes "
        f"{figures('ours', dpo)}; from the logits of Keras' `Dense` in mixed precision, which rounds them to bfloat16, "
        f"{figures('Keras', dpo)}.",
        width=120,
    )


BLOCKS = {
    "gpu-machine": tables.machine,
    "gpu-short": _gpu_short,
    "gpu-sentence": _gpu_sentence,
    "machine": _machine,
    "headline": functools.partial(_short, lines=_HEADLINE),
    "better": _better,
    "worse": _worse,
    "bars": lambda results: tables.named(bars.table(results)),
    "faster": tables.faster,
}
