"""The figures, as a file that later runs add to."""

import json
from pathlib import Path
from statistics import median

# Facts that make figures comparable. The libraries of peers may be there in one run and not in another.
SAME = ("processor", "cores", "system", "python", "tensorflow", "keras")


def read(path: Path, machine: dict | None = None) -> dict:
    """The results in a file, or none; those of another machine are refused."""
    if not path.exists():
        return {"machine": machine, "rows": []}
    results = json.loads(path.read_text())
    if machine is not None:
        other = [name for name in SAME if results["machine"].get(name) != machine.get(name)]
        if other:
            raise SystemExit(
                f"{path} was measured where {other[0]} is {results['machine'].get(other[0])!r}, and here it is "
                f"{machine.get(other[0])!r}. Remove it, or name another file with --output."
            )
        there = {name: version for name, version in machine.items() if version is not None}
        if "GPU" in results["machine"]:
            # Of several GPUs the first stays; records of another say so.
            there.pop("GPU", None)
        results["machine"] |= there
    return results


def add(results: dict, record: dict, machine: dict | None = None) -> None:
    """Puts a record in the place of one of the same case, or at the end, with its GPU if that is another."""
    if machine is not None and machine.get("GPU") != results["machine"].get("GPU"):
        record["GPU"] = machine["GPU"].split(",")[0]
    for place, other in enumerate(results["rows"]):
        if _key(other) == _key(record):
            results["rows"][place] = record
            return
    results["rows"].append(record)


def has(results: dict, row: str, case: dict, unit: str, rounds: int) -> bool:
    """Returns whether there is a record of this case; for times, one with at least as many rounds."""
    wanted = _key({"row": row, "case": case, "unit": unit})
    least = rounds if unit == "milliseconds" else 1
    return any(_key(record) == wanted and record["rounds"] >= least for record in results["rows"])


def _key(record):
    return json.dumps([record["row"], record["case"], record["unit"]], sort_keys=True)


def write(results: dict, path: Path) -> None:
    """Written anew, so that no half of a file is left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = ",\n".join("  " + json.dumps(record) for record in results["rows"])
    text = f'{{\n "machine": {json.dumps(results["machine"])},\n "rows": [\n{rows}\n ]\n}}\n'
    new = path.with_suffix(".new")
    new.write_text(text)
    new.replace(path)


def find(results: dict, row: str, **case) -> list[dict]:
    """The records of a row whose case is as given, in the order of the file."""
    return [
        record
        for record in results["rows"]
        if record["row"] == row and all(record["case"].get(name) == value for name, value in case.items())
    ]


def ratio(record: dict, over: str, under: str) -> float | None:
    """Returns the ratio of the two: the median of the rounds' ratios, None where one is missing."""
    values = record["values"]
    if not values.get(over) or not values.get(under):
        return None
    return median(a / b for a, b in zip(values[over], values[under], strict=True))
