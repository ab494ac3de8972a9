"""The sdist is whole, and the wheel works where nothing else of the checkout is."""

import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.test_docs import README, ROOT, last_number, versions

pytestmark = pytest.mark.whole

# Only what a program of the user has: neither the checkout on the path, nor the tests' settings.
VARIABLES = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "KERAS_BACKEND")}
ON_JAX = """
import keras
import numpy as np

import keras_xent as kx

keras.utils.set_random_seed(0)
model = keras.Sequential([keras.layers.Embedding(50, 16, mask_zero=True), kx.layers.LogitsDense(50)])
loss = kx.losses.MaskedSequenceCrossentropy(ignore_class=0)
model.compile("adam", loss, metrics=[kx.metrics.Perplexity(ignore_class=0)])
tokens = np.random.default_rng(0).integers(1, 50, (64, 17))
data = tokens[:, :-1], tokens[:, 1:]
logger = kx.callbacks.PerplexityLogger("log.csv")
history = model.fit(*data, epochs=5, validation_data=data, callbacks=[logger], verbose=0).history
model.save("model.keras")
loaded = keras.models.load_model("model.keras")
perplexity = loaded.evaluate(*data, verbose=0, return_dict=True)["perplexity"]
print(keras.backend.backend(), *history["val_perplexity"], perplexity)
"""


def run(*command, cwd, **variables):
    done = subprocess.run(command, cwd=cwd, env={**VARIABLES, **variables}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(kind, source, folder):
    """The file that setuptools makes of a source tree."""
    program = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(folder)!r}))"
    return folder / run(sys.executable, "-c", program, cwd=source).splitlines()[-1]


def checkout():
    """The files of the checkout that git tracks or would."""
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).splitlines()
    return [name for name in listed if (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    source = tmp_path_factory.mktemp("source")
    for name in checkout():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    return build("sdist", source, tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    """Made from the sdist, as an index's users get it."""
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (source,) = folder.iterdir()
    return build("wheel", source, tmp_path_factory.mktemp("wheel"))


def environment(folder, wheel, dependencies):
    """The Python of an environment that holds the wheel, and sees what lies in the folders of dependencies."""
    run(sys.executable, "-m", "venv", "--without-pip", str(folder), cwd=folder)
    python = next(path for path in (folder / "bin/python", folder / "Scripts/python.exe") if path.exists())
    pip = (sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index")
    run(*pip, "--disable-pip-version-check", str(wheel), cwd=folder)
    (packages,) = folder.glob("**/site-packages")
    # Lines of a .pth file are folders; their own .pth files (an editable install of the checkout) are not read.
    (packages / "dependencies.pth").write_text("\n".join(map(str, dependencies)))
    where = run(
        str(python), "-c", "from importlib.util import find_spec; print(find_spec('keras_xent').origin)", cwd=folder
    ).strip()
    assert Path(where).is_relative_to(folder)
    return str(python)


INSTALLED = [Path(path) for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    return environment(tmp_path_factory.mktemp("environment"), wheel, INSTALLED)


@pytest.fixture(scope="module")
def python_without_tensorflow(wheel, tmp_path_factory):
    """As after `pip install --no-deps keras-xent` and `pip install keras jax`."""
    folder = tmp_path_factory.mktemp("packages")
    for entry in (entry for path in reversed(INSTALLED) for entry in path.iterdir()):
        if not entry.name.lower().startswith(("tensorflow", "tensorboard", "keras_xent", "__editable__")):
            (folder / entry.name).unlink(missing_ok=True)
            (folder / entry.name).symlink_to(entry)
    return environment(tmp_path_factory.mktemp("without_tensorflow"), wheel, [folder])


def test_the_sdist_holds_every_file_of_the_checkout(sdist):
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert {name for name in checkout() if not name.startswith(".git")} - held == set()


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert held == {name for name in checkout() if name.startswith("keras_xent/")}


def test_the_metadata_is_fit_for_the_page_of_an_index(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(name))
    assert metadata["Name"] == "keras-xent"
    assert metadata["Author"] == "keras_xent contributors"
    assert metadata["License-Expression"] == "Apache-2.0"
    urls = dict(line.split(", ") for line in metadata.get_all("Project-URL"))
    assert {"Documentation", "Source", "Issues", "Changelog"} <= set(urls)
    assert {"deploy", "docs", "examples", "jax", "plot", "test"} <= set(metadata.get_all("Provides-Extra"))
    page = metadata.get_payload()
    links = re.findall(r"\]\(([^)]+)\)", page)
    assert len(links) > 15
    assert all(link.startswith("https://") for link in links)
    (picture,) = re.findall(r"!\[[^]]*\]\(([^)]+)\)", page)
    assert "/raw/" in picture


def test_the_citation_names_the_version_of_the_package(wheel):
    (version,) = re.findall(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert wheel.name.startswith(f"keras_xent-{version}-")


def test_the_code_of_the_readme_runs_from_the_wheel(python, tmp_path):
    classifier, language_model = versions(README, "+")
    assert last_number(run(python, "-c", classifier, cwd=tmp_path)) > 0.7
    assert last_number(run(python, "-c", language_model.replace("epochs=3", "epochs=1"), cwd=tmp_path)) < 1000


def test_the_command_that_scores_files_is_installed(python, tmp_path):
    (command,) = Path(python).parent.glob("keras-xent-score*")
    assert "--stride" in run(str(command), "--help", cwd=tmp_path)


def test_jax_without_tensorflow_trains_logs_saves_and_loads(python_without_tensorflow, tmp_path):
    printed = run(python_without_tensorflow, "-c", ON_JAX, cwd=tmp_path, KERAS_BACKEND="jax")
    backend, *perplexities = printed.split()
    first, *_, trained, loaded = map(float, perplexities)
    assert backend == "jax"
    assert 10 < loaded < 50
    assert trained < first
    assert loaded == pytest.approx(trained, rel=1e-5)
    assert (tmp_path / "log.csv").read_text().count("\n") >= 2


def test_what_needs_tensorflow_says_so_where_it_is_missing(python_without_tensorflow, tmp_path):
    program = "import keras_xent\nkeras_xent.callbacks.TensorBoard('logs')"
    command = [python_without_tensorflow, "-c", program]
    variables = {**VARIABLES, "KERAS_BACKEND": "jax"}
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True)
    assert done.returncode == 1
    assert re.match(r"ImportError: .* Run: pip install tensor", done.stderr.splitlines()[-1])
