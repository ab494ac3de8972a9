"""The package is described in setup.cfg; this file makes the links of README.md absolute for the page of an index."""

import re
from pathlib import Path

from setuptools import setup

REPOSITORY = "https://github.com/keras-xent/keras-xent"


def with_absolute_links(markdown: str) -> str:
    """Markdown whose links and pictures of the repository are addresses."""
    markdown = re.sub(r"!\[([^]]*)\]\((?!https?:)([^)]+)\)", rf"![\1]({REPOSITORY}/raw/main/\2)", markdown)
    return re.sub(r"\]\((?!https?:|#)([^)]+)\)", rf"]({REPOSITORY}/blob/main/\1)", markdown)


if __name__ == "__main__":
    readme = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
    setup(long_description=with_absolute_links(readme), long_description_content_type="text/markdown")
