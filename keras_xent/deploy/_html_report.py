"""A page that shows how hard each token of a text was to predict."""

import html
import math
import string
from collections.abc import Iterable
from importlib import resources
from typing import Any

from keras_xent.deploy._documents import Piece

# Nats at which the next color begins.
STEPS = (0.5, 1, 2, 3, 4, 6, 8, 11)


def page(results: Iterable[tuple[str, dict[str, Any], list[Piece]]]) -> str:
    """HTML of texts: the name of each, the numbers of its `summary`, and its pieces. It needs no other file."""
    opacities = [f"{i / len(STEPS) * 0.72:.2f}" for i in range(len(STEPS) + 1)]
    between = [f"{low:g} to {high:g}" for low, high in zip(STEPS, STEPS[1:], strict=False)]
    labels = [f"&lt; {STEPS[0]:g}", *between, f"{STEPS[-1]:g} and more"]
    template = string.Template(resources.files("keras_xent.deploy").joinpath("report.html").read_text("utf-8"))
    return template.substitute(
        colors="\n".join(f".l{i} {{ background: rgb(var(--loss) / {o}); }}" for i, o in enumerate(opacities)),
        legend="".join(f'<span class="l{i}">{label}</span>' for i, label in enumerate(labels)),
        texts="\n".join(_text(*result) for result in results),
    )


def _text(name, figures, pieces):
    shown = [f"{figures['tokens']:,} tokens", f"{figures['bytes']:,} bytes"]
    for key, unit in (("perplexity", "perplexity {:,.2f}"), ("bits_per_byte", "{:.3f} bits per byte")):
        shown.append(unit.format(math.inf if figures[key] is None else figures[key]))
    body = "".join(map(_span, pieces))
    return f'<h2>{html.escape(name)}</h2>\n<p class="figures">{" · ".join(shown)}</p>\n<div class="text">{body}</div>'


def _span(piece):
    # The color of an end of line would not be seen.
    text = html.escape(piece.text).replace("\r", "").replace("\n", "⏎\n")
    if piece.nll is None:
        return f'<span class="none" title="not scored">{text}</span>'
    color = sum(piece.nll >= step for step in STEPS)
    return f'<span class="l{color}" title="{piece.nll:.3f} nats, p = {math.exp(-piece.nll):.3g}">{text}</span>'
