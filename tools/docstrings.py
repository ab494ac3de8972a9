"""An extension of griffe, which reads the docstrings for the site: doctests become blocks of code."""

import re

import griffe

DOCTEST = re.compile(r"(?:^>>> .*\n?(?:^(?!\s*$|>>> ).*\n?)*)+", re.MULTILINE)


class Doctests(griffe.Extension):
    """Fences doctests, which Markdown would take for quotations."""

    def on_object(self, *, obj, **_):
        """Rewrites the docstring of a class, function or module."""
        if obj.docstring:
            text = DOCTEST.sub(lambda found: f"```pycon\n{found[0].rstrip()}\n```\n", obj.docstring.value)
            obj.docstring.value = re.sub(r"^(Examples?|References):", r"**\1:**", text, flags=re.MULTILINE)
