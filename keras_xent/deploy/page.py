"""A page that shows how hard each token of a text was to predict."""

import html
import math
from collections.abc import Iterable
from typing import Any

from keras_xent.deploy.document import Piece

# Nats at which the next colour begins.
STEPS = (0.5, 1, 2, 3, 4, 6, 8, 11)

# The colour is laid over the page's own, so that the text is readable on both a light and a dark one.
_STYLE = """
:root { color-scheme: light dark; --loss: 214 62 30; }
body { font: 16px/1.7 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
  background: light-dark(#fff, #16181c); color: light-dark(#1a1a1a, #e6e6e6); }
h1 { font-size: 1.3rem; } h2 { font-size: 1.05rem; margin: 2.2rem 0 .2rem; overflow-wrap: anywhere; }
.figures { margin: 0 0 .6rem; opacity: .75; font-variant-numeric: tabular-nums; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; padding: 1rem; border-radius: 6px;
  font-family: ui-monospace, monospace; font-size: .9rem; border: 1px solid light-dark(#ddd, #3a3d44); }
.text span { border-radius: 2px; } .text span:hover { outline: 2px solid currentColor; }
.legend { position: sticky; top: 0; padding: .5rem 0; background: inherit; display: flex; flex-wrap: wrap; gap: .3rem; }
.legend span { padding: 0 .6rem; border-radius: 3px; font-size: .85rem; font-variant-numeric: tabular-nums; }
.none { border-bottom: 1px dotted currentColor; }
"""


def page(results: Iterable[tuple[str, dict[str, Any], list[Piece]]]) -> str:
    """HTML of texts: the name of each, the numbers of its `summary`, and its pieces. It needs no other file."""
    colours = "\n".join(
        f".l{i} {{ background: rgb(var(--loss) / {i / len(STEPS) * 0.72:.2f}); }}" for i in range(len(STEPS) + 1)
    )
    bounds = [f"&lt; {STEPS[0]:g}", *(f"{a:g} to {b:g}" for a, b in zip(STEPS, STEPS[1:], strict=False))]
    legend = "".join(
        f'<span class="l{i}">{label}</span>' for i, label in enumerate([*bounds, f"{STEPS[-1]:g} and more"])
    )
    texts = "\n".join(_text(*result) for result in results)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Cross-entropy of each token</title>\n<style>{_STYLE}{colours}\n</style>\n</head>\n<body>\n"
        f'<h1>Cross-entropy of each token</h1>\n<div class="legend">{legend}'
        '<span><span class="none">not scored</span></span><span>nats; point at a token for its own</span></div>\n'
        f"{texts}\n</body>\n</html>\n"
    )


def _text(name, figures, pieces):
    shown = [f"{figures['tokens']:,} tokens", f"{figures['bytes']:,} bytes"]
    for key, unit in (("perplexity", "perplexity {:,.2f}"), ("bits_per_byte", "{:.3f} bits per byte")):
        shown.append(unit.format(math.inf if figures[key] is None else figures[key]))
    body = "".join(map(_span, pieces))
    return f'<h2>{html.escape(name)}</h2>\n<p class="figures">{" · ".join(shown)}</p>\n<div class="text">{body}</div>'


def _span(piece):
    # The colour of an end of line would not be seen.
    text = html.escape(piece.text).replace("\r", "").replace("\n", "⏎\n")
    if piece.nll is None:
        return f'<span class="none" title="not scored">{text}</span>'
    colour = sum(piece.nll >= step for step in STEPS)
    return f'<span class="l{colour}" title="{piece.nll:.3f} nats, p = {math.exp(-piece.nll):.3g}">{text}</span>'
