"""Perplexity and bits per byte of text files: `python -m keras_xent.deploy score MODEL FILE...`."""

import argparse
import contextlib
import functools
import json
import math
import sys

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from keras_xent.deploy import document, page
from keras_xent.deploy.scorer import load_scorer


def main(arguments: argparse.Namespace) -> int:
    """Scores each file, and returns the exit status: 1 if one of them could not be scored."""
    console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    with contextlib.ExitStack() as stack:
        try:
            scorer = load_scorer(arguments.model)
            tokenizer = document.load_tokenizer(_tokenizer_for(scorer, arguments))
            # Before the work, so that it is not done for nothing.
            output, html = (_opened(path, stack) for path in (arguments.output, arguments.html))
        except (OSError, ValueError) as error:
            console.print(f"error: {error}")
            return 1
        columns = BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        progress = Progress(TextColumn("{task.description}", markup=False), *columns, console=console, transient=True)
        stack.enter_context(progress)
        scored = []
        for name in arguments.files:
            task = progress.add_task(name, total=None)
            try:
                text = document.read(name, tokenizer)
                progress.update(task, total=len(text.ids))
                likelihood = scorer.score_document(
                    text.ids,
                    context=arguments.context,
                    stride=arguments.stride,
                    batch_size=arguments.batch_size,
                    progress=functools.partial(progress.advance, task),
                )
                figures = document.summary(text, likelihood)
            except (OSError, ValueError) as error:
                figures = {"error": getattr(error, "strerror", None) or str(error)}
                console.print(f"{name}: {figures['error']}")
            else:
                scored.append((name, figures, document.pieces(text, likelihood) if html else []))
            progress.remove_task(task)
            print(json.dumps({"file": name, **figures}, allow_nan=False), file=output or sys.stdout, flush=True)
        if html:
            html.write(page.page(scored))
    if len(scored) > 1:
        console.print(_all_of([figures for _, figures, _ in scored]))
    return 1 if len(scored) < len(arguments.files) else 0


def _tokenizer_for(scorer, arguments):
    if not scorer.causal:
        raise ValueError(f"'{arguments.model}' scores inputs with labels. For text it takes a language model.")
    if arguments.tokenizer is None and scorer.tokenizer is None:
        raise ValueError(
            f"There is no tokenizer beside '{arguments.model}'. Give its JSON file with --tokenizer, or export the "
            "model with `tokenizer`."
        )
    return arguments.tokenizer or scorer.tokenizer


def _opened(path, stack):
    # A file's name may hold what is no text.
    return path and stack.enter_context(open(path, "w", encoding="utf-8", errors="replace"))


def _all_of(figures):
    """One line for all files together: each token counts the same."""
    tokens, size = (sum(one[name] for one in figures) for name in ("tokens", "bytes"))
    likelihoods = [one["log_likelihood"] for one in figures]
    total = -math.inf if None in likelihoods else sum(likelihoods)
    figures = document.totals(tokens, size, total)
    shown = (f"{figures[name]:.4f}" if figures[name] is not None else "inf" for name in ("perplexity", "bits_per_byte"))
    return "{} files, {:,} tokens: perplexity {}, bits per byte {}".format(len(likelihoods), tokens, *shown)


def _positive(text):
    number = int(text)
    if number < 1:
        raise ValueError
    return number


# What argparse says of a value that is none.
_positive.__name__ = "whole number above 0"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m keras_xent.deploy", description=__doc__)
    score = top.add_subparsers(required=True, metavar="score").add_parser(
        "score",
        help="perplexity and bits per byte of text files",
        description="Writes a line of JSON for each file, and exits with status 1 if one of them could not be scored.",
    )
    score.add_argument("model", metavar="MODEL", help="folder that keras_xent.deploy.export_scorer has written")
    score.add_argument("files", metavar="FILE", nargs="+", help="text in UTF-8")
    score.add_argument("--tokenizer", metavar="JSON", help="default: the one exported with the model")
    score.add_argument("--context", type=_positive, metavar="N", help="most tokens given; default: the model's, or 512")
    score.add_argument("--stride", type=_positive, metavar="N", help="tokens scored at a time; default: half of them")
    score.add_argument("--batch-size", type=_positive, default=8, metavar="N", help="windows at a time; default: 8")
    score.add_argument("--output", metavar="JSONL", help="where the lines go; default: the standard output")
    score.add_argument("--html", metavar="FILE", help="a page that colours each token by its cross-entropy")
    return top


if __name__ == "__main__":
    sys.exit(main(parser().parse_args()))
