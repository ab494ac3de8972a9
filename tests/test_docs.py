"""The pages say what the code does."""

import doctest
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from tests.backend import environment

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "examples" / "README.md"]
PAGES += sorted((ROOT / "docs").glob("*.md"))
THEORY = ROOT / "docs" / "theory.md"


def every_block(page):
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


def blocks(page):
    return [block for block in every_block(page) if not block.startswith(">>>")]


def sessions(page):
    """The blocks that show what they print, as one."""
    return "\n".join(block for block in every_block(page) if block.startswith(">>>"))


def programs(page):
    """The blocks of a page, one program from each that imports this package to the next."""
    text = ""
    for block in blocks(page):
        if "import keras_xent" in block and "import keras_xent" in text:
            yield text
            text = ""
        text += block + "\n"
    yield text


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name)
def test_the_code_on_a_page_runs(page, tmp_path):
    for program in programs(page):
        (tmp_path / "page.py").write_text(program)
        command = [sys.executable, "page.py"]
        run = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        if page.name in ("README.md", "perplexity.md"):
            assert "perplexity: " in run.stdout


@pytest.mark.parametrize("page", [page for page in PAGES if sessions(page)], ids=lambda page: page.name)
def test_the_code_on_a_page_prints_what_the_page_says(page):
    session = doctest.DocTestParser().get_doctest(sessions(page), {}, page.name, str(page), 0)
    printed = []
    failed, attempted = doctest.DocTestRunner(verbose=False).run(session, out=printed.append)
    assert attempted > 0
    assert failed == 0, "".join(printed)


def numbers(text):
    return {float(number.replace(",", "").replace("_", "")) for number in re.findall(r"\d+(?:[.,_]\d+)*", text)}


def test_every_number_of_the_theory_is_one_that_its_code_is_given_or_prints():
    prose = re.sub(r"```.*?```|\]\([^)]*\)", "", THEORY.read_text(), flags=re.DOTALL)
    assert len(numbers(prose)) > 30
    assert numbers(prose) - numbers(sessions(THEORY)) == set()


def test_the_pictures_of_the_theory_are_those_that_the_tool_draws(tmp_path):
    runpy.run_path(str(ROOT / "tools" / "theory.py"))["main"](tmp_path)
    drawn = {picture.name for picture in tmp_path.glob("*.png")}
    assert drawn == {picture.name for picture in (ROOT / "docs").glob("theory-*.png")}
    assert drawn == set(re.findall(r"!\[[^]]*\]\((.*?)\)", THEORY.read_text()))


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
