"""Results as Markdown."""

import re
from statistics import median, quantiles

from tools.bench.results import find, ratio

FLOOR = "floor"
# What the numbers of a table are.
ABOUT = {
    "milliseconds": "Milliseconds, medians of {rounds} rounds.",
    "megabytes": "Peak memory in MB.",
    "compilations": "Programs that XLA was given.",
    "operations": "Operations in the graph.",
    "error": "Largest error, over the largest value.",
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
    records = find(results, row, **case)
    if not records:
        return "Not measured yet."
    rounds = " or ".join(map(str, sorted({record["rounds"] for record in records})))
    about_numbers = ABOUT[records[0]["unit"]].format(rounds=rounds)
    return "\n\n".join([about_numbers, "\n".join(_lines(results, records)), *_reasons(records)])


def _lines(results, records):
    has_other = any("GPU" in record for record in records)
    facts_of = [({"GPU": gpu(results, record)} if has_other else {}) | about(record["case"]) for record in records]
    names = list(dict.fromkeys(name for facts in facts_of for name in facts))
    peers = list(dict.fromkeys(name for record in records for name in record["peers"]))
    yield "| " + " | ".join([*names, *map(named, peers)]) + " |"
    yield "|---" * len(names) + "|--:" * len(peers) + "|"
    for record, facts in zip(records, facts_of, strict=True):
        cells = (cell(record, name) if name in record["peers"] else "" for name in peers)
        yield "| " + " | ".join([*(facts.get(name, "") for name in names), *cells]) + " |"


def gpu(results: dict, record: dict) -> str:
    """The GPU of a record, by its short name."""
    return " ".join(record.get("GPU", results["machine"]["GPU"]).split()[:2])


def about(case: dict) -> dict[str, str]:
    """Returns the description of a case, by the heading of its column."""
    facts = {}
    if "shape" in case and "features" in case:
        facts["[tokens, features, classes]"] = f"[{case['rows']}, {case['features']}, {case['classes']}]"
    elif "rows" in case:
        facts["[rows, classes]"] = f"[{case['rows']}, {case['classes']}]"
    if "logits" in case:
        facts["logits"] = str(case["logits"])
    if case.get("question") in ("new_shape", "first_call", "lengths", "graph") or {"loss", "calls"} <= case.keys():
        facts["loss"] = case["loss"]
    if case.get("question") == "loss":
        facts["dtype"] = case["dtype"]
    if "output" in case:
        facts["output"] = case["output"]
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


def named(text: str) -> str:
    """The text with the name of the package, which the results call "ours"."""
    return re.sub(r"\bours\b", "keras_xent", text)


def number(value: float, digits: int = 3) -> str:
    """A number of so many digits, or of all those before its point."""
    rounded = float(f"{value:.{digits}g}")
    return f"{value:,.0f}" if rounded >= 100 else f"{rounded:g}"


def cell(record: dict, name: str) -> str:
    """The median, and how many times the first column it is; bold where nobody needs less."""
    values = record["values"].get(name)
    if not values:
        return "–"
    first = record["peers"][0]
    value = number(median(values))
    if name in _best(record):
        value = f"**{value}**"
    if name == first or first not in record["values"] or record["unit"] in ("compilations", "operations", "error"):
        return value
    times = ratio(record, name, first)
    return f"{value} ({times:.2f}{', tie' if name != FLOOR and is_tie(record, name) else ''})"


def _best(record):
    """Those with the smallest number, where ours are compared with others."""
    if record["unit"] not in ("milliseconds", "megabytes") or not record["peers"][0].startswith("ours"):
        return []
    other_work = (FLOOR, *record["case"].get("beside", ()))
    medians = {name: median(values) for name, values in record["values"].items() if values and name not in other_work}
    if all(name.startswith("ours") for name in medians):
        return []
    return [name for name, value in medians.items() if value == min(medians.values())]


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
        yield "\n".join(f"- {named(name)} –: {reason}." for name, reason in reasons)


def title(row: str, case: dict) -> str:
    """A case in a few words."""
    return " ".join([row, *about(case).values()])


def line(record: dict) -> str:
    """One record in one line."""
    values = [f"{name} {median(values):.4g}" for name, values in record["values"].items()]
    dashes = [f"{name} – ({reason})" for name, reason in record["missing"].items()]
    return f"{', '.join(values + dashes)} {record['unit']}"


def faster(results: dict) -> str:
    """Every case in which another is faster than ours, without ties, the largest ratio first; one line for a case."""
    lines = []
    for record in results["rows"]:
        ours, *others = record["peers"]
        if record["unit"] != "milliseconds" or not ours.startswith("ours") or ours not in record["values"]:
            continue
        found = []
        for name in others:
            if name == FLOOR or name.startswith("ours") or name not in record["values"] or is_tie(record, name):
                continue
            times = 1 / ratio(record, name, ours)
            if times > 1:
                found.append((times, f"{name} {times:.2f}"))
        if found:
            found.sort(reverse=True)
            case = ", ".join(about(record["case"]).values())
            lines.append((found[0][0], f"| {record['row']} | {case} | {'; '.join(text for _, text in found)} |"))
    if not lines:
        return "None."
    heading = "| table | case | who is faster, and how many times |\n|---|---|---|"
    return "\n".join([heading, *(line for _, line in sorted(lines, reverse=True))])
