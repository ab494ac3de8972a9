"""How the package is built: imports run one way, private names stand in one file, public names are listed."""

import ast
import importlib
import pathlib
import re
import subprocess
import sys

import keras
import pytest

import keras_xent
from tests.backend import environment

ROOT = pathlib.Path(keras_xent.__file__).parent

# From the lowest layer up. A module may import from its own subpackage and from lower layers.
LAYERS = [
    {"_types"},
    {"_backend", "_keras"},
    {"_words", "arguments"},
    {"_elsewhere", "_named_arguments", "config"},
    {"kernels"},
    {"_accumulation", "_endings", "_loss_statistics", "provenance"},
    {"layers", "losses", "metrics", "preference"},
    {"_without_logits"},
    {"accumulation", "callbacks", "deploy", "calibration", "distillation", "log_probs", "packing", "top_k_log_probs"},
    {"__init__"},
]
RULE = (
    "{file} imports {imported}. Imports run one way: _types -> _backend | _keras -> arguments -> kernels -> "
    "provenance | _loss_statistics -> layers | losses | metrics -> callbacks | deploy -> __init__. Subpackages of one "
    "layer do not import each other. What two of them need belongs into a layer below both."
)
VAGUE_NAMES = {"utils", "util", "common", "misc", "helpers", "helper", "tools", "shared"}


def _modules():
    """The source of every module of the package by its dotted name."""
    return {
        ".".join(("keras_xent", *path.relative_to(ROOT).with_suffix("").parts)): path.read_text()
        for path in ROOT.rglob("*.py")
    }


def _subpackage(module):
    """The subpackage or module directly under keras_xent; the package itself is the top layer."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] != "__init__" else "__init__"


def _layer(name):
    for layer, names in enumerate(LAYERS):
        if name in names:
            return layer
    raise AssertionError(f"keras_xent.{name} has no layer: add it to LAYERS, as low as its imports allow.")


def _imported(module, source):
    """The modules of the package that are imported anywhere in the source, relative imports resolved."""
    package = module.removesuffix(".__init__").split(".") if module.endswith("__init__") else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "keras_xent")
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *filter(None, [node.module])])
            if origin.split(".")[0] == "keras_xent":
                # `from keras_xent import provenance` imports the module keras_xent.provenance.
                yield from (f"{origin}.{alias.name}" if origin == "keras_xent" else origin for alias in node.names)


def _violations(modules):
    for module, source in sorted(modules.items()):
        own = _subpackage(module)
        for imported in sorted(set(_imported(module, source))):
            other = _subpackage(imported)
            if other != own and _layer(other) >= _layer(own):
                yield RULE.format(file=module.replace(".", "/") + ".py", imported=imported)


def test_imports_run_one_way():
    assert list(_violations(_modules())) == []


@pytest.mark.parametrize(
    "module, source, imported",
    [
        ("keras_xent.kernels.softmax", "from keras_xent.losses import base", "keras_xent.losses"),
        ("keras_xent.kernels.softmax", "def f():\n    import keras_xent.provenance", "keras_xent.provenance"),
        ("keras_xent.kernels.softmax", "from ..metrics.perplexity import Perplexity", "keras_xent.metrics.perplexity"),
        ("keras_xent.kernels.__init__", "from .. import provenance", "keras_xent.provenance"),
        ("keras_xent.provenance", "import keras_xent", "keras_xent"),
        ("keras_xent.losses.base", "from keras_xent import metrics", "keras_xent.metrics"),
        ("keras_xent.callbacks.tensorboard", "from keras_xent.deploy import scorer", "keras_xent.deploy"),
    ],
)
def test_imports_that_run_another_way_are_found(module, source, imported):
    file = module.replace(".", "/") + ".py"
    assert list(_violations({module: source})) == [RULE.format(file=file, imported=imported)]


@pytest.mark.parametrize(
    "module, source",
    [
        (
            "keras_xent.losses.base",
            "from keras_xent import provenance\nfrom keras_xent.losses.base import Crossentropy",
        ),
        ("keras_xent.losses.__init__", "from .base import Crossentropy"),
        ("keras_xent.callbacks.tensorboard", "import keras\nfrom keras_xent.metrics import Perplexity"),
        ("keras_xent.__init__", "from keras_xent import callbacks, kernels"),
    ],
)
def test_imports_that_run_the_right_way_are_let_through(module, source):
    assert list(_violations({module: source})) == []


def test_no_module_is_named_utils_or_the_like():
    names = {part.lstrip("_") for module in _modules() for part in module.split(".")}
    assert names & VAGUE_NAMES == set(), "name a module after the one idea it holds"


# One place for each


def _files_with(pattern, *, outside):
    """Lines of the package that match, in files that do not begin with `outside`."""
    for module, source in sorted(_modules().items()):
        name = module.removeprefix("keras_xent.")
        if not name.startswith(outside):
            for number, line in enumerate(source.splitlines(), 1):
                if re.search(pattern, line):
                    yield f"{module}:{number}: {line.strip()}"


def test_the_backend_is_asked_for_in_one_folder():
    assert (
        list(_files_with(r"backend\.backend\(|^\s*(import|from) (jax|tensorflow)\b", outside=("_backend", *USES_TF)))
        == []
    )


# Scoring is exported as a SavedModel, TensorBoard's files are TensorFlow's.
USES_TF = ("deploy", "callbacks")
KERAS_PRIVATE = (
    r"keras\.src|\._keras_(mask|logits|history)|\._(inbound_nodes|flatten_layers|direction|iterations)\b"
    r"|(layer|model|optimizer)\._(kernel|embeddings|trainable_variables)\b"
)


def test_private_names_of_keras_stand_in_one_file():
    assert list(_files_with(KERAS_PRIVATE, outside="_keras")) == []
    # The frames of Keras are looked at there too, and no others.
    assert list(_files_with(r"\b(_getframe|f_back|f_locals|inspect\.stack)\b", outside="_keras")) == []


def test_at_most_ten_private_names_of_keras_are_used():
    source = _modules()["keras_xent._keras"]
    code = re.sub(r'""".*?"""', "", source, flags=re.DOTALL)
    names = set(re.findall(r"keras\.src(?:\.\w+)*|(?<=[.\"])_[a-z]\w+", code)) - {"_getframe", "_replace", "_types"}
    assert len(names) <= 10, sorted(names)


@pytest.mark.parametrize("folder, most", [("keras_xent", 300), ("tests", 400)])
def test_no_file_is_longer_than_its_limit(folder, most):
    lengths = {str(path): len(path.read_text().splitlines()) for path in (ROOT.parent / folder).rglob("*.py")}
    assert {path: length for path, length in lengths.items() if length > most} == {}


def test_contributing_names_every_file():
    page = (ROOT.parent / "CONTRIBUTING.md").read_text()
    layout = page.partition("## Layout")[2].partition("\n## ")[0]
    named = set(re.findall(r"`(\w+)\.py`", layout))
    modules = [module.split(".")[1:] for module in _modules() if not module.endswith("__")]
    packages = {parts[0] for parts in modules if len(parts) > 1}
    # Public files bear the name of what they hold, but for the kernels.
    must = {p[-1] for p in modules if len(p) == 1 or p[-1].startswith("_") or p[0] == "kernels"}
    assert must - named == set()
    assert named - {parts[-1] for parts in modules} == set()
    assert packages <= set(re.findall(r"`(\w+)/`", layout))


# Public names


def test_dir_shows_the_public_names_only():
    assert dir(keras_xent) == sorted([*keras_xent.__all__, "__version__"])


PACKAGES = sorted(
    name.removesuffix(".__init__") for name in _modules() if name.endswith(".__init__") and "_backend" not in name
)


@pytest.mark.parametrize("package", PACKAGES)
def test_all_is_sorted_and_lists_every_name_that_the_package_imports(package):
    source = _modules()[f"{package}.__init__"]
    bound = [
        alias.asname or alias.name
        for node in ast.parse(source).body
        if isinstance(node, ast.ImportFrom) and not node.module.startswith("keras_xent._")
        for alias in node.names
    ]
    module = importlib.import_module(package)
    assert module.__all__ == sorted(module.__all__)
    assert sorted(bound) == module.__all__
    assert all(hasattr(module, name) for name in module.__all__)


def test_every_class_that_keras_can_load_is_public():
    registered = {cls for name, cls in keras.saving.get_custom_objects().items() if name.startswith("keras_xent>")}
    public = {getattr(importlib.import_module(p), n) for p in PACKAGES for n in importlib.import_module(p).__all__}
    assert registered
    assert registered <= public


def test_every_public_loss_layer_and_metric_can_be_loaded_by_keras():
    saved = (keras.losses.Loss, keras.metrics.Metric, keras.layers.Layer)
    for package in PACKAGES:
        for name in (module := importlib.import_module(package)).__all__:
            cls = getattr(module, name)
            if isinstance(cls, type) and issubclass(cls, saved):
                assert keras.saving.get_registered_name(cls) == f"keras_xent>{name}"


# Importing

TIMED = """
import keras, time
start = time.thread_time()
import keras_xent
print(time.thread_time() - start)
"""


@pytest.mark.whole
def test_importing_the_package_adds_at_most_50_ms_to_importing_keras():
    def seconds():
        command = [sys.executable, "-c", TIMED]
        # As it is installed: compiled once, by the first of these.
        variables = {**environment(), "PYTHONDONTWRITEBYTECODE": ""}
        return float(subprocess.run(command, env=variables, capture_output=True, text=True, check=True).stdout)

    # The time of one thread, and the least of up to ten: what else the machine does is not the package's.
    assert any(seconds() < 0.050 for _ in range(10))


@pytest.mark.whole
def test_an_unsupported_backend_is_refused_in_one_sentence():
    """Keras itself cannot be imported without its backend, so here it only says that it runs on it."""
    program = "import keras; keras.backend.backend = lambda: 'torch'; import keras_xent"
    child = subprocess.run([sys.executable, "-c", program], env=environment(), capture_output=True, text=True)
    assert child.returncode == 1
    assert child.stderr.splitlines()[-1] == (
        "ImportError: keras_xent works on the Keras backends 'tensorflow' and 'jax', and Keras runs on 'torch': set "
        "the environment variable KERAS_BACKEND to one of the two before importing keras."
    )
