"""`python -m tools.bench run` and `python -m tools.bench table`."""

import argparse
import json
import sys
from pathlib import Path

from tools.bench import tables

RESULTS = Path("runs/bench.json")
ROWS = ("sigmoid", "dense", "sparse", "linear", "head", "fit", "metrics", "callbacks", "first-step", "memory", "import")


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(prog="tools/bench", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="run | table")
    run_parser = commands.add_parser("run", help="measure, and print the table")
    run_parser.add_argument("--only", action="append", choices=ROWS, help="this row; may be repeated")
    run_parser.add_argument("--quick", action="store_true", help="three rounds in place of eleven")
    run_parser.add_argument("--output", type=Path, default=RESULTS)
    run_parser.set_defaults(command=run)
    table_parser = commands.add_parser("table", help="print results as a Markdown table")
    table_parser.add_argument("results", type=Path, nargs="?", default=RESULTS)
    table_parser.set_defaults(command=table)
    arguments = parser.parse_args()
    arguments.command(arguments)


def run(arguments: argparse.Namespace) -> None:
    """Measures row by row and keeps what it has after each."""
    # Imported here, so that `table` needs no TensorFlow.
    from tools.bench import callbacks, first_step, fit, head, imports, linear, machine, memory, metrics, timing

    rounds = 3 if arguments.quick else 11
    results = {"machine": machine.facts(), "rounds": rounds, "rows": []}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    for name in arguments.only or ROWS:
        other = {
            "linear": linear,
            "head": head,
            "fit": fit,
            "metrics": metrics,
            "callbacks": callbacks,
            "first-step": first_step,
            "memory": memory,
            "import": imports,
        }.get(name)
        for record in other.measure(rounds) if other else timing.measure(name, rounds):
            print(tables.line(record), file=sys.stderr)
            results["rows"].append(record)
            arguments.output.write_text(json.dumps(results, indent=1))
    print(tables.markdown(results))


def table(arguments: argparse.Namespace) -> None:
    """Prints what an earlier run has written."""
    print(tables.markdown(json.loads(arguments.results.read_text())))


if __name__ == "__main__":
    main()
