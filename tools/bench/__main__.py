"""Measures the package against what one would use instead, and against what the machine can do."""

import argparse
import sys
import time
from pathlib import Path

from tools.bench import results as _results
from tools.bench import rows_of_gpu, tables
from tools.bench.rows import QUICK_ROUNDS, ROUNDS, ROWS

RESULTS, QUICK_RESULTS = Path("runs/bench.json"), Path("runs/bench-quick.json")
GPU_RESULTS = Path("runs/bench-gpu.json")


def main(arguments: list[str] | None = None) -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(prog="tools/bench", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="run | table | plot")
    run_parser = commands.add_parser("run", help="measure, and print the tables")
    run_parser.add_argument(
        "--only", action="append", choices=[*ROWS, *rows_of_gpu.ROWS], help="this row; may be repeated"
    )
    run_parser.add_argument("--library", action="append", help="only peers of this library; may be repeated")
    run_parser.add_argument("--gpu", action="store_true", help="the rows for a GPU, on JAX and PyTorch")
    run_parser.add_argument("--quick", action="store_true", help=f"{QUICK_ROUNDS} rounds in place of {ROUNDS}")
    run_parser.add_argument("--resume", action="store_true", help="leave out what the file has already")
    run_parser.add_argument("--output", type=Path, help=f"default: {RESULTS}, or {QUICK_RESULTS}")
    run_parser.set_defaults(command=run)
    table_parser = commands.add_parser("table", help="print results as Markdown tables")
    table_parser.add_argument("results", type=Path, nargs="?", default=RESULTS)
    table_parser.add_argument(
        "--write", action="store_true", help="keep them as docs/performance.json, and write them into the pages"
    )
    table_parser.set_defaults(command=table)
    plot_parser = commands.add_parser("plot", help="draw the pictures of docs/performance-tables.md")
    plot_parser.add_argument("results", type=Path, nargs="?", default=Path("docs/performance.json"))
    plot_parser.add_argument("--output", type=Path, default=Path("docs"))
    plot_parser.set_defaults(command=plot)
    parsed = parser.parse_args(arguments)
    parsed.command(parsed)


def run(arguments: argparse.Namespace) -> None:
    """Measures case by case and keeps what it has after each."""
    from tools.bench import machine, measuring
    from tools.bench.workers import LIBRARIES, Workers

    rounds = QUICK_ROUNDS if arguments.quick else ROUNDS
    path = arguments.output or (GPU_RESULTS if arguments.gpu else QUICK_RESULTS if arguments.quick else RESULTS)
    rows = rows_of_gpu.ROWS if arguments.gpu else ROWS
    other = [name for name in arguments.only or () if name not in rows]
    if other:
        raise SystemExit(f"--only {other[0]} is a row {'of a CPU' if arguments.gpu else 'for --gpu'}.")
    works = [work for name in arguments.only or rows for work in rows[name]()]
    libraries = rows_of_gpu.LIBRARIES if arguments.gpu else LIBRARIES
    if arguments.library:
        # Others are not even started.
        libraries = {name: library for name, library in libraries.items() if name in arguments.library}
        works = [work.of_libraries(arguments.library) for work in works]
        works = [work for work in works if work.peers]
    start, failed, row = time.monotonic(), [], None
    with Workers(libraries) as workers:
        facts = machine.facts() | measuring.versions(workers)
        found = _results.read(path, facts)
        for number, work in enumerate(works, 1):
            if arguments.resume and _results.has(found, work.row, work.case, work.unit, rounds):
                continue
            if row not in (None, work.row):
                # A process that has trained large models takes longer for the next (DPO by a tenth).
                workers.end()
            row = work.row
            begin = time.monotonic()
            title = tables.title(work.row, work.case)
            print(f"[{number}/{len(works)}, {(begin - start) / 60:.1f} min] {title}", file=sys.stderr)
            try:
                record = measuring.record(work, workers, rounds)
                record["seconds"] = round(time.monotonic() - begin)
            except Exception as reason:
                # One that breaks does not cost the others.
                failed.append(f"{title}: {reason}")
                print(f"    {failed[-1]}", file=sys.stderr)
                continue
            print(f"    {tables.line(record)}", file=sys.stderr)
            _results.add(found, record, facts)
            _results.write(found, path)
    print(tables.everything(found))
    if failed:
        raise SystemExit("Not measured:\n" + "\n".join(failed))


def table(arguments: argparse.Namespace) -> None:
    """Prints what an earlier run has written."""
    found = _results.read(arguments.results)
    if not found["rows"]:
        raise SystemExit(f"There are no results in {arguments.results}: tools/bench/run makes them.")
    if arguments.write:
        from tools.bench import pages

        pages.write(found)
    print(tables.everything(found))


def plot(arguments: argparse.Namespace) -> None:
    """Draws what an earlier run has written."""
    from tools.bench import pictures

    for picture in pictures.draw(_results.read(arguments.results), arguments.output):
        print(picture)


if __name__ == "__main__":
    main()
