"""The pages say what the code does."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.backend import environment

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page):
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name)
def test_the_code_on_a_page_runs(page, tmp_path):
    (tmp_path / "page.py").write_text("\n".join(blocks(page)))
    run = subprocess.run([sys.executable, "page.py"], cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    if page.name in ("README.md", "perplexity.md"):
        assert "perplexity: " in run.stdout


def test_the_table_of_differences_is_what_the_tool_prints():
    command = [sys.executable, str(ROOT / "tools" / "numerics.py")]
    printed = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True).stdout
    page = (ROOT / "docs" / "numerics.md").read_text()
    rows = [line for line in printed.splitlines() if line.startswith("|")]
    assert len(rows) > 20
    ours = [row.split("|")[1:4:2] for row in rows]
    on_page = [line.split("|")[1:4:2] for line in page.splitlines() if line.count("|") == 5]
    # Keras' answers are those of the version named on the page; ours are ours on every version.
    for row in ours:
        assert row in on_page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target
