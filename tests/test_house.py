"""How the package is built: one way of imports, complete lists of names, no rooms for odds and ends, a light import."""

import ast
import importlib
import pathlib
import subprocess
import sys

import keras
import pytest

import keras_xent
from tests.backend import environment

HOUSE = pathlib.Path(keras_xent.__file__).parent

# Rooms from the ground up. Each may import from its own room and from those on lower floors.
FLOORS = [
    {"kernels"},
    {"arguments", "source", "statistics"},
    {"layers", "losses", "metrics"},
    {"callbacks", "deploy"},
    {"__init__"},
]
RULE = (
    "{file} imports {imported}. Imports run one way: keras.ops -> kernels -> arguments, source, statistics -> layers | "
    "losses | metrics -> callbacks, deploy -> __init__. Rooms on one floor do not know each other. What two rooms need "
    "belongs on a floor below both."
)
ODDS_AND_ENDS = {"utils", "util", "common", "misc", "helpers", "helper", "tools", "shared"}


def _modules():
    """The source of every module of the package by its dotted name."""
    return {
        ".".join(("keras_xent", *path.relative_to(HOUSE).with_suffix("").parts)): path.read_text()
        for path in HOUSE.rglob("*.py")
    }


def _room(module):
    """The room of `keras_xent.room.module`; the package itself is on the top floor."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] != "__init__" else "__init__"


def _floor(room):
    for floor, rooms in enumerate(FLOORS):
        if room in rooms:
            return floor
    raise AssertionError(f"No floor is known for keras_xent.{room}: add it to FLOORS, where its imports allow.")


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
                # `from keras_xent import source` imports the module keras_xent.source.
                yield from (f"{origin}.{alias.name}" if origin == "keras_xent" else origin for alias in node.names)


def _against_the_rule(modules):
    for module, source in sorted(modules.items()):
        room = _room(module)
        for imported in sorted(set(_imported(module, source))):
            other = _room(imported)
            if other != room and _floor(other) >= _floor(room):
                yield RULE.format(file=module.replace(".", "/") + ".py", imported=imported)


def test_imports_run_one_way():
    assert list(_against_the_rule(_modules())) == []


@pytest.mark.parametrize(
    "module, source, imported",
    [
        ("keras_xent.kernels.softmax", "from keras_xent.losses import base", "keras_xent.losses"),
        ("keras_xent.kernels.softmax", "def f():\n    import keras_xent.source", "keras_xent.source"),
        ("keras_xent.kernels.softmax", "from ..metrics.perplexity import Perplexity", "keras_xent.metrics.perplexity"),
        ("keras_xent.kernels.__init__", "from .. import source", "keras_xent.source"),
        ("keras_xent.source", "import keras_xent", "keras_xent"),
        ("keras_xent.losses.base", "from keras_xent import metrics", "keras_xent.metrics"),
        ("keras_xent.callbacks.tensorboard", "from keras_xent.deploy import scorer", "keras_xent.deploy"),
    ],
)
def test_imports_that_run_another_way_are_found(module, source, imported):
    file = module.replace(".", "/") + ".py"
    assert list(_against_the_rule({module: source})) == [RULE.format(file=file, imported=imported)]


@pytest.mark.parametrize(
    "module, source",
    [
        ("keras_xent.losses.base", "from keras_xent import source\nfrom keras_xent.losses.reduction import reduce"),
        ("keras_xent.losses.__init__", "from .base import Crossentropy"),
        ("keras_xent.callbacks.tensorboard", "import keras\nfrom keras_xent.metrics import Perplexity"),
        ("keras_xent.__init__", "from keras_xent import callbacks, kernels"),
    ],
)
def test_imports_that_run_the_right_way_are_let_through(module, source):
    assert list(_against_the_rule({module: source})) == []


def test_no_module_is_named_utils_or_the_like():
    names = {part.lstrip("_") for module in _modules() for part in module.split(".")}
    assert names & ODDS_AND_ENDS == set(), "name a module after the one idea it holds"


# Public names

PACKAGES = sorted(name.removesuffix(".__init__") for name in _modules() if name.endswith(".__init__"))


@pytest.mark.parametrize("package", PACKAGES)
def test_all_is_sorted_and_lists_every_name_that_the_package_imports(package):
    source = _modules()[f"{package}.__init__"]
    bound = [
        alias.asname or alias.name
        for node in ast.parse(source).body
        if isinstance(node, ast.ImportFrom)
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


def test_importing_the_package_adds_at_most_50_ms_to_importing_keras():
    def seconds():
        command = [sys.executable, "-c", TIMED]
        # As it is installed: compiled once, by the first of these.
        variables = {**environment(), "PYTHONDONTWRITEBYTECODE": ""}
        return float(subprocess.run(command, env=variables, capture_output=True, text=True, check=True).stdout)

    # The time of one thread, and the least of up to ten: what else the machine does is not the package's.
    assert any(seconds() < 0.050 for _ in range(10))


def test_an_unsupported_backend_is_refused_in_one_sentence():
    """Keras itself cannot be imported without its backend, so here it only says that it runs on it."""
    program = "import keras; keras.backend.backend = lambda: 'torch'; import keras_xent"
    child = subprocess.run([sys.executable, "-c", program], env=environment(), capture_output=True, text=True)
    assert child.returncode == 1
    assert child.stderr.splitlines()[-1] == (
        "ImportError: keras_xent serves the Keras backends 'tensorflow' and 'jax', and Keras runs on 'torch': set the "
        "environment variable KERAS_BACKEND to one of the two before importing keras."
    )
