"""The pages say what the code does."""

import ast
import builtins
import doctest
import html
import inspect
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from tests.backend import environment

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = [README, *(ROOT / name for name in ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "examples/README.md"))]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
THEORY = ROOT / "docs" / "theory.md"
NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"


def name(page):
    return page.relative_to(ROOT).as_posix()


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


def versions(page, sign):
    """The programs that a page shows as a difference: `-` for the lines of before, `+` for those of after."""
    for block in re.findall(r"```diff\n(.*?)```", page.read_text(), re.DOTALL):
        yield "\n".join(line[1:] for line in block.splitlines() if line[:1] in (" ", sign, ""))


def printed(program, folder):
    """What a program prints in a process of its own."""
    (folder / "page.py").write_text(program)
    run = subprocess.run([sys.executable, "page.py"], cwd=folder, env=environment(), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


def numbers(text):
    return {float(number.replace(",", "").replace("_", "")) for number in re.findall(r"\d+(?:[.,_]\d+)*", text)}


def last_number(text):
    return float(re.findall(r"-?\d+(?:\.\d+)?", text)[-1])


@pytest.mark.whole
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=name)
def test_the_code_on_a_page_runs_and_prints_about_what_the_page_says(page, tmp_path):
    for program in programs(page):
        lines = printed(program, tmp_path).splitlines()
        said = re.findall(r"^print\(.*# .*\babout ([\d.]+)$", program, re.MULTILINE)
        assert [last_number(line) for line in lines[len(lines) - len(said) :]] == [
            pytest.approx(float(number), rel=0.1) for number in said
        ]


@pytest.mark.whole
@pytest.mark.parametrize("sign, column", [("-", 0), ("+", 1)], ids=["Keras", "keras_xent"])
def test_both_sides_of_the_differences_in_the_readme_print_what_it_says(sign, column, tmp_path):
    said = r"prints ([\d., ]+) with Keras,\s+and ([\d., ]+) with keras_xent"
    accuracy, language = re.findall(said, README.read_text())
    classifier, language_model = versions(README, sign)
    accuracies = sorted(numbers(accuracy[column]))
    # Training that loses its gradient takes another course on another processor; the order of the two sides stays.
    assert accuracies[0] - 0.1 < last_number(printed(classifier, tmp_path)) < accuracies[-1] + 0.1
    assert last_number(printed(language_model, tmp_path)) == pytest.approx(max(numbers(language[column])), rel=0.1)


@pytest.mark.whole
def test_the_notebook_runs_from_top_to_bottom_and_prints_about_what_it_shows(tmp_path):
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    mark = "print('-- end of cell --')"
    lines = printed("\n".join("".join(cell["source"]) + f"\n{mark}\n" for cell in cells), tmp_path)
    for cell, text in zip(cells, lines.split("-- end of cell --\n")[:-1], strict=True):
        shown = "".join("".join(output["text"]) for output in cell["outputs"])
        assert len(text.splitlines()) == len(shown.splitlines())
        for line, expected in zip(text.splitlines(), shown.splitlines(), strict=True):
            if re.search(r"\d", expected):
                assert last_number(line) == pytest.approx(last_number(expected), rel=0.1)


@pytest.mark.whole
@pytest.mark.parametrize("page", [page for page in PAGES if sessions(page)], ids=name)
def test_the_code_on_a_page_prints_what_the_page_says(page):
    session = doctest.DocTestParser().get_doctest(sessions(page), {}, page.name, str(page), 0)
    output = []
    failed, attempted = doctest.DocTestRunner(verbose=False).run(session, out=output.append)
    assert attempted > 0
    assert failed == 0, "".join(output)


def test_every_number_of_the_theory_is_one_that_its_code_is_given_or_prints():
    prose = re.sub(r"```.*?```|\]\([^)]*\)", "", THEORY.read_text(), flags=re.DOTALL)
    assert len(numbers(prose)) > 30
    assert numbers(prose) - numbers(sessions(THEORY)) == set()


@pytest.mark.whole
def test_the_pictures_of_the_theory_are_those_that_the_tool_draws(tmp_path):
    runpy.run_path(str(ROOT / "tools" / "theory.py"))["main"](tmp_path)
    drawn = {picture.name for picture in tmp_path.glob("*.png")}
    assert drawn == {picture.name for picture in (ROOT / "docs").glob("theory-*.png")}
    assert drawn == set(re.findall(r"!\[[^]]*\]\((.*?)\)", THEORY.read_text()))


@pytest.mark.whole
def test_the_table_of_differences_is_what_the_tool_prints():
    command = [sys.executable, str(ROOT / "tools" / "numerics.py")]
    text = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True).stdout
    page = (ROOT / "docs" / "numerics.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) > 20
    ours = [row.split("|")[1:4:2] for row in rows]
    on_page = [line.split("|")[1:4:2] for line in page.splitlines() if line.count("|") == 5]
    # Keras' answers are those of the version named on the page; ours are ours on every version.
    for row in ours:
        assert row in on_page


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.whole
def test_the_site_is_built_without_a_warning_and_shows_every_public_name(tmp_path):
    """MkDocs checks links and their anchors as well."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    variables = environment(NO_MKDOCS_2_WARNING="1")
    run = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    pages = list(tmp_path.glob("reference/*/index.html"))
    assert {name for name, _ in public()} <= {anchor for page in pages for anchor in anchors(page)}
    text = "".join(html.unescape(re.sub(r"<[^>]+>", "", page.read_text())) for page in pages)
    assert [name for name, value in public() if value.__doc__.splitlines()[0].replace("`", "") not in text] == []
    assert "<math" in (tmp_path / "theory" / "index.html").read_text()
    assert (tmp_path / "search" / "search_index.json").stat().st_size > 100_000


def anchors(page):
    return re.findall(r'id="(keras_xent[\w.]*)"', page.read_text())


def public():
    """Every public class and function by its name, packages and their modules aside."""
    import keras_xent

    modules = [keras_xent, *(getattr(keras_xent, each) for each in keras_xent.__all__)]
    for module in (module for module in modules if inspect.ismodule(module)):
        listed = getattr(module, "__all__", [each for each in vars(module) if not each.startswith("_")])
        for each in listed:
            if callable(value := getattr(module, each)) and value.__module__.startswith("keras_xent"):
                yield f"{module.__name__}.{each}", value


def test_a_docstring_explains_its_own_arguments():
    """`help()` shows one docstring, and none of those that it might refer to."""
    found = [
        name for name, value in public() if re.search(r"^ +[\w*, \n]+: as in `", value.__doc__ or "", re.MULTILINE)
    ]
    assert found == []


def test_a_loss_shows_how_a_model_is_compiled_with_it():
    losses = {name: value for name, value in public() if name.startswith("keras_xent.losses.") and name[18].isupper()}
    assert len(losses) >= 4
    assert [name for name, value in losses.items() if ".compile(" not in value.__doc__] == []


def names_that_are_missing(docstring):
    """The names that the examples of a docstring use without defining, importing or explaining them."""
    source = "".join(example.source for example in doctest.DocTestParser().get_examples(docstring or ""))
    known, missing = set(dir(builtins)), set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            known |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.Name):
            (known if isinstance(node.ctx, ast.Store) else missing).add(node.id)
    return missing - known


def test_an_example_of_a_docstring_runs_where_nothing_else_is_imported():
    """`help()` shows neither the imports of the module nor the fixtures of the tests."""
    assert {name: missing for name, value in public() if (missing := names_that_are_missing(value.__doc__))} == {}


def test_every_loss_of_keras_works_or_says_where_it_is():
    import keras

    import keras_xent

    ours = {name for name in keras_xent.losses.__all__ if hasattr(keras.losses, name)}
    assert len(ours) == 12
    for name in (name for name in dir(keras.losses) if not name.startswith("_") and name not in ours):
        with pytest.raises(AttributeError, match=rf"Use `keras\.losses\.{name}`\.$"):
            getattr(keras_xent.losses, name)
