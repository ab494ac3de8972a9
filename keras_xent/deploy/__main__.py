"""Perplexity and bits per byte of text files: `keras-xent-score MODEL FILE...`."""

import argparse
import contextlib
import functools
import json
import math
import sys

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from keras_xent.deploy import _documents, _html_report, _outputs
from keras_xent.deploy._load import load_scorer
from keras_xent.deploy._tokenizers import load_tokenizer


def main(arguments: argparse.Namespace) -> int:
    """Scores each file, and returns the exit status: 1 if something could not be scored or written."""
    console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    try:
        scorer = load_scorer(arguments.model)
        tokenizer = load_tokenizer(_tokenizer_path(scorer, arguments))
        outputs = {"--output": arguments.output, "--html": arguments.html}
        written = {option: path for option, path in outputs.items() if path}
        _outputs.check_outputs(written, [*arguments.files, *filter(None, [arguments.tokenizer])], arguments.model)
        with contextlib.ExitStack() as stack:
            # Opened before the work, so that it is not done for nothing.
            output, html = (_outputs.opened(path, stack) for path in outputs.values())
            scored = _score_files(scorer, tokenizer, arguments, console, output or sys.stdout)
            if html:
                html.write(_html_report.page(scored))
    except (OSError, ValueError) as error:
        # Writing, other than opening, does not name the file.
        if isinstance(error, OSError) and error.filename is None:
            console.print(f"error: The results cannot be written ({error.strerror}).")
            _outputs.discard_standard_output()
        else:
            console.print(f"error: {error}")
        return 1
    if len(scored) > 1:
        console.print(_totals([figures for _, figures, _ in scored]))
    return 1 if len(scored) < len(arguments.files) else 0


def _score_files(scorer, tokenizer, arguments, console, output):
    """Writes a line for each file. Returns name, figures and pieces of those that could be scored."""
    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    scored = []
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        for name in arguments.files:
            task = progress.add_task(name, total=None)
            try:
                document = _documents.read(name, tokenizer)
                progress.update(task, total=len(document.ids))
                likelihood = scorer.score_document(
                    document.ids,
                    context=arguments.context,
                    stride=arguments.stride,
                    batch_size=arguments.batch_size,
                    start_in_every_window=arguments.start_in_every_window,
                    progress=functools.partial(progress.advance, task),
                )
                figures = _documents.summary(document, likelihood)
            except (OSError, ValueError) as error:
                figures = {"error": getattr(error, "strerror", None) or str(error)}
                console.print(f"{name}: {figures['error']}")
            else:
                scored.append((name, figures, _documents.pieces(document, likelihood) if arguments.html else []))
            progress.remove_task(task)
            print(json.dumps({"file": name, **figures}, allow_nan=False), file=output, flush=True)
    return scored


def _tokenizer_path(scorer, arguments):
    if not scorer.causal:
        raise ValueError(f"'{arguments.model}' scores inputs with labels. For text it takes a language model.")
    if arguments.tokenizer is None and scorer.tokenizer is None:
        raise ValueError(
            f"There is no tokenizer beside '{arguments.model}'. Give its JSON file with --tokenizer, or export the "
            "model with `tokenizer`."
        )
    return arguments.tokenizer or scorer.tokenizer


def _totals(figures):
    """One line for all files together: each token counts the same."""
    tokens, size = (sum(one[name] for one in figures) for name in ("tokens", "bytes"))
    likelihoods = [one["log_likelihood"] for one in figures]
    total = -math.inf if None in likelihoods else sum(likelihoods)
    totals = _documents.totals(tokens, size, total)
    shown = (f"{totals[name]:.4f}" if totals[name] is not None else "inf" for name in ("perplexity", "bits_per_byte"))
    return "{} files, {:,} tokens: perplexity {}, bits per byte {}".format(len(likelihoods), tokens, *shown)


def _positive(text):
    number = int(text)
    if number < 1:
        raise ValueError
    return number


# What argparse calls an invalid value.
_positive.__name__ = "whole number above 0"


def parser() -> argparse.ArgumentParser:
    """The command line of `python -m keras_xent.deploy`."""
    top = argparse.ArgumentParser(prog="python -m keras_xent.deploy", description=__doc__)
    commands = top.add_subparsers(required=True, metavar="score")
    _add_arguments(commands.add_parser("score", help="perplexity and bits per byte of text files"))
    return top


def score() -> int:
    """The command `keras-xent-score`."""
    command = argparse.ArgumentParser(prog="keras-xent-score")
    _add_arguments(command)
    return main(command.parse_args())


def _add_arguments(score):
    score.description = (
        "Perplexity and bits per byte of text files. Writes a line of JSON for each file, and exits with status 1 if "
        "one of them could not be scored."
    )
    score.add_argument("model", metavar="MODEL", help="folder that keras_xent.deploy.export_scorer has written")
    score.add_argument("files", metavar="FILE", nargs="+", help="text in UTF-8")
    score.add_argument("--tokenizer", metavar="JSON", help="default: the one exported with the model")
    score.add_argument("--context", type=_positive, metavar="N", help="most tokens given; default: the model's, or 512")
    score.add_argument("--stride", type=_positive, metavar="N", help="tokens scored at a time; default: half of them")
    score.add_argument("--batch-size", type=_positive, default=8, metavar="N", help="windows at a time; default: 8")
    score.add_argument(
        "--start-in-every-window", action="store_true", help="begin each window with the start token, not the first one"
    )
    score.add_argument("--output", metavar="JSONL", help="where the lines go; default: the standard output")
    score.add_argument("--html", metavar="FILE", help="a page that colors each token by its cross-entropy")


if __name__ == "__main__":
    sys.exit(main(parser().parse_args()))
