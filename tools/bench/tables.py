"""Results as Markdown."""

from itertools import groupby
from statistics import median, quantiles

FLOOR = "floor"
# What a record measures, by its unit, and how that is told.
ABOUT = {
    "milliseconds": "Forward and backward in ms, warm: the median of {rounds} rounds. In brackets, times "
    "the first column of the same round: the median and the quartiles of the rounds' ratios. A tie: the quartiles hold "
    "1, or the median is within 3 % of it.",
    "seconds": "A step with a number of rows new to it, compilation included, in s: the median of {rounds} steps.",
    "megabytes": "Peak memory of the first step above where it started, gradient and compilation included, in MB, one "
    "sample each (times the first column).",
}


def markdown(results: dict) -> str:
    """One table for each unit, under the facts of the machine."""
    records = [record for record in results["rows"] if record["row"] != "import"]
    parts = [", ".join(f"{name} {value}" for name, value in results["machine"].items()) + "."]
    for unit, about in ABOUT.items():
        chosen = [record for record in records if unit in record]
        if chosen:
            parts.append(about.format(rounds=results["rounds"]))
        for _, same in groupby(chosen, key=lambda record: list(record[unit])):
            parts.append("\n".join(_table(list(same), unit)))
    parts += [line(record) for record in results["rows"] if record["row"] == "import"]
    return "\n\n".join(parts)


def line(record: dict) -> str:
    """One record in one line."""
    unit = next(unit for unit in ABOUT if unit in record)
    values = ", ".join(f"{name} {median(values):.4g}" for name, values in record[unit].items())
    return f"{' '.join(_of(record))}: {values} ({unit})"


def _of(record):
    shape = record.get("shape")
    sizes = [f"[{shape['rows']}, {shape['classes']}]"] if shape else []
    return [record["row"], *sizes, *([record["dtype"]] if "dtype" in record else [])]


def _table(records, unit):
    peers = list(records[0][unit])
    yield "| " + " | ".join(["loss", "logits", "dtype", *peers]) + " |"
    yield "|---" * 3 + "|--:" * len(peers) + "|"
    for record in records:
        values = record[unit]
        # A compilation is hundreds of times what Keras needs, which no ratio makes clearer.
        cells = [f"{median(values[n]):.2g}" if unit == "seconds" else _cell(n, values) for n in peers]
        yield "| " + " | ".join([*_of(record), *cells]) + " |"


def _cell(name, values):
    value = f"{median(values[name]):.4g}"
    first = next(iter(values))
    if name == first:
        return value
    ratios = [other / ours for other, ours in zip(values[name], values[first], strict=True)]
    middle = median(ratios)
    if len(ratios) < 3:
        return f"{value} ({middle:.2f})"
    low, _, high = quantiles(ratios, n=4, method="inclusive")
    tie = ", tie" if name != FLOOR and (low <= 1 <= high or abs(middle - 1) < 0.03) else ""
    return f"{value} ({middle:.2f}; {low:.2f} to {high:.2f}{tie})"
