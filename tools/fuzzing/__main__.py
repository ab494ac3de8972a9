"""The command line of `tools/fuzz`."""

import argparse
import os
import pathlib
import subprocess
import sys
import time
from typing import Any

BACKENDS = ("tensorflow", "jax")


def parse(arguments: list[str] | None = None) -> Any:
    """The arguments."""
    parser = argparse.ArgumentParser(prog="tools/fuzz")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--cases", type=int)
    parser.add_argument("--backend", choices=(*BACKENDS, "both"), default="both")
    parser.add_argument("--kernel", action="append")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("runs/fuzz"))
    parser.add_argument("--replay", type=pathlib.Path, metavar="FILE")
    return parser.parse_args(arguments)


def main() -> int:
    """0 if nothing failed."""
    args = parse()
    if args.replay:
        from tools.fuzzing.calls import load

        call, backend = load(args.replay)
        os.environ["KERAS_BACKEND"] = backend
        return replay(call)
    if args.backend == "both":
        command = [sys.executable, "-m", "tools.fuzzing", *sys.argv[1:]]
        return max([subprocess.call([*command, "--backend", backend]) for backend in BACKENDS])
    os.environ["KERAS_BACKEND"] = args.backend
    return explore(args)


def replay(call: Any) -> int:
    """Runs one call again."""
    from tools.fuzzing import checking, running

    print(call)
    _, failures = checking.check(call, running.run)
    print(*failures or ["nothing is wrong"], sep="\n")
    return bool(failures)


def explore(args: Any) -> int:
    """Tries random calls until the time is over or there are enough cases."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from tools.fuzzing.exploring import Explorer

    explorer = Explorer(args.seed, args.output, args.kernel)
    begin, limit = time.monotonic(), 60 * args.minutes
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[done]}"), TimeRemainingColumn())
    with Progress(*columns, transient=True) as progress:
        task = progress.add_task(f"fuzz {args.backend}", total=1.0, done="")
        while True:
            part = max((time.monotonic() - begin) / limit, explorer.cases / args.cases if args.cases else 0.0)
            progress.update(task, completed=min(part, 1.0), done=explorer.summary())
            if part >= 1:
                break
            for line in explorer.step():
                progress.console.print(line, markup=False, highlight=False, soft_wrap=True)
    print(f"{args.backend}, seed {args.seed}: {explorer.summary()} in {time.monotonic() - begin:.0f} s")
    print(*(f"  {name:28}{number:9,} cases" for name, number in explorer.by_kernel.items()), sep="\n")
    return bool(explorer.failures)


if __name__ == "__main__":
    sys.exit(main())
