"""A hook of MkDocs: pages that are made from other sources, links that leave docs/, and formulas.

The site shows files from outside docs/ (README.md and others), the notebook, and a reference of every public name,
which is read from the `__all__` of each package. Formulas become MathML, which browsers show without a script.
"""

import ast
import json
import posixpath
import re
from pathlib import Path

from latex2mathml import converter
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
REPOSITORY = "https://github.com/keras-xent/keras-xent/blob/main/"
# Files of the repository and the pages that they become.
PAGES = {
    "README.md": "index.md",
    "examples/README.md": "examples.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "docs/quickstart.ipynb": "quickstart.md",
}


def on_config(config):
    """Adds the pages of the reference to the navigation, before the last section."""
    config.nav.insert(-1, {"Reference": sorted(reference(), key=lambda page: page != "reference/keras_xent.md")})
    return config


def on_files(files, config):
    """Adds the pages that are not in docs/."""
    for source, page in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        text = notebook(text) if source.endswith(".ipynb") else text
        files.append(File.generated(config, page, content=with_links_of_the_site(text, source, page)))
    for page, text in reference().items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown, page, **_):
    """Mends links out of docs/ and turns formulas into MathML."""
    if not page.file.generated_by:
        markdown = with_links_of_the_site(markdown, f"docs/{page.file.src_uri}", page.file.src_uri)
    return re.sub(r"^```math\n(.*?)^```$", formula, markdown, flags=re.DOTALL | re.MULTILINE)


def formula(found):
    """A fenced formula as a block of MathML."""
    return f"<div>{converter.convert(found[1].strip(), display='block')}</div>"


def with_links_of_the_site(markdown, source, page):
    """Markdown from `source`, a path in the repository, with its links as they are from `page` of the site."""

    def link(found):
        target, _, anchor = found[1].partition("#")
        if not target or re.match(r"[a-z]+:", target):
            return found[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        there = PAGES.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else None)
        if there is None:
            return f"]({REPOSITORY}{path})"
        there = posixpath.relpath(there, posixpath.dirname(page) or ".")
        return f"]({there}#{anchor})" if anchor else f"]({there})"

    return re.sub(r"\]\(([^)\s]+)\)", link, markdown)


def notebook(text):
    """The cells of a notebook as Markdown, with what they print."""
    parts = []
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        parts.append(f"```python\n{source}\n```" if cell["cell_type"] == "code" else source)
        printed = "".join("".join(output.get("text", "")) for output in cell.get("outputs", []))
        if printed:
            parts.append(f"```text\n{printed.rstrip()}\n```")
    return "\n\n".join(parts)


def reference():
    """A page for each public package: its docstring, and every public name."""
    pages = {}
    for path in sorted(ROOT.glob("keras_xent/*/__init__.py")):
        if not path.parent.name.startswith("_"):
            pages |= page_of(path, path.parent.name, public_names(path))
    root = ROOT / "keras_xent"
    pages |= page_of(root / "__init__.py", "", public_names(root / "__init__.py"))
    # Public modules that are one file, as `keras_xent.preference`.
    for name in exported_modules(root / "__init__.py"):
        path = root / f"{name}.py"
        if path.is_file():
            pages |= page_of(path, name, public_names(path))
    # Imported by name, since it needs a package of its own.
    pages |= page_of(root / "deploy" / "harness.py", "deploy.harness", ["HarnessModel"])
    return pages


def page_of(path, name, names):
    """The page of the module `keras_xent.name`, if it has public names."""
    module = f"keras_xent.{name}" if name else "keras_xent"
    about = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    entries = "\n\n".join(entry(path, module, each) for each in names)
    return {f"reference/{name or 'keras_xent'}.md": f"# `{module}`\n\n{about}\n\n{entries}\n"} if names else {}


def entry(path, module, name):
    """The place on a page where a name is shown."""
    if not (path.parent / f"{name}.py").is_file() or path.name != "__init__.py":
        return f"::: {module}.{name}"
    # There is a module of the same name, which would be shown: look where the name itself comes from.
    tree = ast.parse(path.read_text(encoding="utf-8"))
    origins = [
        node.module for node in tree.body if isinstance(node, ast.ImportFrom) for a in node.names if a.name == name
    ]
    return f'<a id="{module}.{name}"></a>\n\n::: {origins[0]}.{name}' if origins else f"::: {module}.{name}"


def public_names(path):
    """Returns the names in `__all__` but for modules; without it, the classes and functions without an underscore."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "__all__":
            modules = exported_modules(path)
            return [name for name in ast.literal_eval(node.value) if name not in modules]
    defined = (node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef))
    return [name for name in defined if not name.startswith("_")]


def exported_modules(path):
    """The modules that are imported from the package itself."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imports = (node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module == "keras_xent")
    return {alias.name for node in imports for alias in node.names}
