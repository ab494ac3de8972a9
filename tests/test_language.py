"""The terms of the field: words that the project used to have of its own stay out of code and pages."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent

# What was said, and the term for it.
RETIRED = {
    r"(is|are) no class\b|axis that is none": "out of range, invalid axis",
    r"\bwhat came\b(?! (before|after))": "received",
    r"[Nn]obody asks|[Ss]omebody asks|who asks( for it)?\b|where nobody looks": "requested, needed",
    r"for want of": "ran out of",
    r"[Aa]ble to say\b|\banother number\b|\bwhat is wanted\b": "reports, a different value, the task",
    r"[Nn]obody (looks|reads|asks)": "is not used",
    r"[Ss]ays so once|is told once": "warns once",
    r"\b(is|are|be|was|were) told\b": "must be specified, receives",
    r"made in memory|makes the logits|logits are never made": "materialized",
    r"[Ee]xact at the edges": "exact in the limits",
    r"[Hh]ouse rules|rooms? on one floor": "package, modules, layers",
    r"knows? (their|its|the) source": "carries its provenance",
    r"(tokens|labels) that (do not )?count\b": "valid tokens",
    r"\b(goes|go|going) on (after|from|over|training|falling|rising)": "continues, resumes",
    r"brings? (the logits|them) back": "materializes",
    r"puts this right": "fixes",
    r"weighs time steps": "is applied along time",
    r"\b(unasked|in_one_piece|as_written|as_operations)\b": "CONTRIBUTING's glossary",
    r"\b(differentiable_ahead|lost_head|masses_of_others)\b": "CONTRIBUTING's glossary",
    r"\b(colour|neighbour|behaviour|labelled|standardis|normalis|organis|recognis|tumour)": "American spelling",
}
FOLDERS = ("keras_xent", "examples", "docs", "tools")


def _lines():
    paths = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".md")]
    for path in sorted([*paths, *ROOT.glob("*.md")]):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            yield f"{path.relative_to(ROOT)}:{number}", line


def test_retired_words_stay_out():
    found = [
        f"{where}: {match[0]!r}, say: {term}"
        for where, line in _lines()
        for pattern, term in RETIRED.items()
        if (match := re.search(pattern, line))
    ]
    assert found == []


@pytest.mark.parametrize(
    "sentence", ["A label that is no class.", "The logits are made in memory.", "tokens that do not count", "colour"]
)
def test_retired_words_are_found(sentence):
    assert any(re.search(pattern, sentence) for pattern in RETIRED)
