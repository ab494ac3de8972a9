"""Results as Markdown."""

from itertools import groupby
from statistics import median, quantiles

from tools.bench.results import ratio

FLOOR = "floor"
# The units, and how a case is described.
ABOUT = {
    "milliseconds": "Milliseconds, warm: the median of {rounds} rounds. In brackets, times the first column: the "
    "median of the rounds' ratios.",
    "megabytes": "Peak memory in MB above where it stood with the inputs there, gradients and compilation included: "
    "fresh processes, one sample each. In brackets, times the first column.",
    "compilations": "Programs that XLA was given.",
    "operations": "Operations in the graph.",
}


def everything(results: dict) -> str:
    """A table for every row, under the facts of the machine."""
    rows = list(dict.fromkeys(record["row"] for record in results["rows"]))
    return "\n\n".join([machine(results), *(f"### {row}\n\n{table(results, row)}" for row in rows)])


def machine(results: dict) -> str:
    """On what it was measured, in one sentence."""
    facts = results["machine"] or {}
    return ", ".join(f"{name} {value}" for name, value in facts.items() if value is not None) + "."


def table(results: dict, row: str, **case) -> str:
    """The records of a row as a table, and the reasons of its dashes below."""
    records = [
        record
        for record in results["rows"]
        if record["row"] == row and all(record["case"].get(name) == value for name, value in case.items())
    ]
    if not records:
        return "Not measured yet."
    parts = []
    for peers, group in groupby(records, key=lambda record: record["peers"]):
        same = list(group)
        rounds = {record["rounds"] for record in same}
        about = ABOUT[same[0]["unit"]].format(rounds=" or ".join(map(str, sorted(rounds))))
        parts += [about, "\n".join(_lines(same, peers)), *_reasons(same)]
    return "\n\n".join(parts)


def _lines(records, peers):
    names = list(dict.fromkeys(name for record in records for name in about(record["case"])))
    yield "| " + " | ".join([*names, *peers]) + " |"
    yield "|---" * len(names) + "|--:" * len(peers) + "|"
    for record in records:
        facts = about(record["case"])
        yield "| " + " | ".join([*(facts.get(name, "") for name in names), *(cell(record, n) for n in peers)]) + " |"


def about(case: dict) -> dict[str, str]:
    """Returns the description of a case, by the heading of its column."""
    facts = {}
    if case.get("question") == "linear":
        facts["[tokens, features, classes]"] = f"[{case['rows']}, {case['features']}, {case['classes']}]"
    elif "rows" in case:
        facts["[rows, classes]"] = f"[{case['rows']}, {case['classes']}]"
    if case.get("question") in ("new_shape", "lengths", "graph"):
        facts["loss"] = case["loss"]
    if case.get("question") == "loss":
        facts["dtype"] = case["dtype"]
    if "smoothing" in case:
        facts["smoothing"] = f"{case['smoothing']:g}"
    if "valid" in case:
        facts["valid"] = f"{case['valid']:.0%}".replace("%", " %")
    if "head" in case:
        facts["loss"] = "masked, of a head" if case["head"] else "sparse"
    if "backend" in case:
        facts["backend"] = {"tensorflow": "TensorFlow", "jax": "JAX"}[case["backend"]]
    if "jit" in case:
        facts["jit_compile"] = {True: "True", False: '"auto"'}[case["jit"]]
    return facts


def cell(record: dict, name: str) -> str:
    """The median, and how many times the first column it is."""
    values = record["values"].get(name)
    if not values:
        return "–"
    value = f"{median(values):.4g}"
    if (
        name == record["peers"][0]
        or record["peers"][0] not in record["values"]
        or record["unit"] in ("compilations", "operations")
    ):
        return value
    times = ratio(record, name, record["peers"][0])
    return f"{value} ({times:.2f}{', tie' if name != FLOOR and is_tie(record, name) else ''})"


def is_tie(record: dict, name: str) -> bool:
    """Returns whether a peer is neither faster nor slower: the median is within 3 %, or 1 between the quartiles."""
    first = record["values"][record["peers"][0]]
    ratios = [other / ours for other, ours in zip(record["values"][name], first, strict=True)]
    if abs(median(ratios) - 1) < 0.03:
        return True
    if len(ratios) < 3:
        return False
    low, _, high = quantiles(ratios, n=4, method="inclusive")
    return low <= 1 <= high


def _reasons(records):
    reasons: dict[tuple[str, str], None] = {}
    for record in records:
        reasons |= dict.fromkeys(record["missing"].items())
    if reasons:
        yield "\n".join(f"- {name} –: {reason}." for name, reason in reasons)


def title(row: str, case: dict) -> str:
    """A case in a few words."""
    return " ".join([row, *about(case).values()])


def line(record: dict) -> str:
    """One record in one line."""
    values = [f"{name} {median(values):.4g}" for name, values in record["values"].items()]
    dashes = [f"{name} – ({reason})" for name, reason in record["missing"].items()]
    return f"{', '.join(values + dashes)} {record['unit']}"


def faster(results: dict) -> str:
    """Returns every case in which another is faster than ours, without ties, the largest ratio first."""
    lines = []
    for record in results["rows"]:
        ours, *others = record["peers"]
        if record["unit"] != "milliseconds" or not ours.startswith("ours") or ours not in record["values"]:
            continue
        for name in others:
            if name == FLOOR or name.startswith("ours") or name not in record["values"] or is_tie(record, name):
                continue
            times = 1 / ratio(record, name, ours)
            if times > 1:
                lines.append((times, f"| {title(record['row'], record['case'])} | {name} | {times:.2f} |"))
    if not lines:
        return "None."
    heading = "| case | who is faster than our first column | how many times |\n|---|---|--:|"
    return "\n".join([heading, *(line for _, line in sorted(lines, reverse=True))])
