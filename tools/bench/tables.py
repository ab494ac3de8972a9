"""Results as Markdown."""

from statistics import median

OURS, FLOOR = "ours, graph", "floor"


def markdown(results: dict) -> str:
    """One table for each unit, under the facts of the machine."""
    records = results["rows"]
    facts = ", ".join(f"{name} {value}" for name, value in results["machine"].items())
    parts = [f"Medians of {results['rounds']} rounds, in turn. {facts}."]
    times = [r for r in records if FLOOR in r.get("milliseconds", ())]
    if times:
        about = "Forward + backward in ms (times ours in a graph; times the floor, the memory alone)."
        parts.append("\n".join([about, "", *_table(times, "milliseconds", (OURS, FLOOR))]))
    memory = [r for r in records if "megabytes" in r]
    if memory:
        about = "Peak memory of the first step beyond its start in MB (times ours in a graph)."
        parts.append("\n".join([about, "", *_table(memory, "megabytes", (OURS,))]))
    for record in records:
        if record["row"] == "import":
            parts.append(line(record))
    return "\n\n".join(parts)


def line(record: dict) -> str:
    """One record in one line."""
    unit = "milliseconds" if "milliseconds" in record else "megabytes"
    values = ", ".join(f"{name} {median(values):.4g}" for name, values in record[unit].items())
    return f"{' '.join(_of(record))}: {values} ({unit})"


def _of(record):
    shape = record.get("shape")
    sizes = [f"[{shape['rows']}, {shape['classes']}]"] if shape else []
    return [record["row"], *sizes, *([record["dtype"]] if "dtype" in record else [])]


def _table(records, unit, against):
    peers = list(records[0][unit])
    yield "| " + " | ".join(["loss", "logits", "dtype", *peers]) + " |"
    yield "|---" * 3 + "|--:" * len(peers) + "|"
    for record in records:
        middle = {name: median(values) for name, values in record[unit].items()}
        cells = [_cell(name, middle, against) for name in peers]
        yield "| " + " | ".join([*_of(record), *cells]) + " |"


def _cell(name, middle, others):
    ratios = [f"{middle[name] / middle[other]:.2f}" for other in others]
    return f"{middle[name]:.4g} ({'; '.join(ratios)})"
