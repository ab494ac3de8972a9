"""What a head gives beside its loss, as the benchmark measures it: peers, float64 references and bars."""

import importlib

import numpy as np
import pytest

from tests.backend import BACKEND
from tests.tiers import fast_for
from tools.bench import agreement, bars_of_outputs, data, rows_of_gpu, rows_of_outputs, tables
from tools.bench.shapes import Head
from tools.bench.work import Work, of_head
from tools.bench.workers import Library, Worker

TOY = Head("toy", 128, 8, 40)
QUESTIONS = [(question, rows_of_outputs.WITHOUT_GRADIENTS.get(question, {})) for question in rows_of_outputs.PEERS]
QUESTIONS += [("accuracy", {"output": output}) for output in ("log_prob", "entropy", "logsumexp")]


@fast_for("distillation-*", "accuracy-*entropy*")
@pytest.mark.parametrize("question, more", QUESTIONS, ids=lambda part: str(part))
def test_kernels_dense_logits_and_float64_agree(question, more, tmp_path):
    library = importlib.import_module(f"tools.bench.peers.{BACKEND}")
    case = of_head(TOY) | {"question": question, **more}
    data.write(case, tmp_path)
    expected = agreement.reference(case, tmp_path)
    if case.get("gradients", True):
        assert {"hidden", "kernel"} < set(expected) and expected["kernel"].shape == (8, 40)
    of_accuracy = rows_of_outputs.OURS | {"Keras, graph": "tensorflow"}
    beside = ("floor", *rows_of_outputs.BESIDE.get(question, ()))
    compared = 0
    for name, where in rows_of_outputs.PEERS.get(question, of_accuracy).items():
        if where == BACKEND and name not in beside:
            agreement.must_agree(library.arrays(library.peer(name, case, str(tmp_path))()), expected, "float32")
            compared += 1
    library.forget()
    assert compared


@fast_for("policy")
@pytest.mark.parametrize("question", rows_of_gpu.OUTPUTS)
def test_what_is_measured_on_a_gpu_agrees_with_float64(question, tmp_path):
    library = importlib.import_module(f"tools.bench.peers.{BACKEND}")
    case = rows_of_outputs.case_of(question, TOY)
    data.write(case, tmp_path)
    expected = agreement.reference(case, tmp_path)
    for name in "ours", "Keras":
        agreement.must_agree(library.arrays(library.peer(name, case, str(tmp_path))()), expected, "float32")
    library.forget()


def test_the_loss_that_is_timed_beside_another_is_not_compared_with_it():
    (work,) = rows_of_outputs.ROWS["top-k"]()
    assert set(work.case["beside"]) < set(work.peers) and work.case["beside"][0] == "ours, labels"


def test_an_error_is_that_of_the_worst_block_and_nan_is_one(monkeypatch):
    monkeypatch.setattr(agreement, "_BLOCK", 2)
    right = {"value": np.array([1.0, -4.0, 2.0])}
    assert agreement.errors({"value": np.array([1.0, -4.0, 2.5])}, right) == {"value": 0.125}
    assert np.isnan(agreement.errors({"value": np.array([1.0, -4.0, np.nan])}, right)["value"])
    with pytest.raises(agreement.Disagreement, match="value is off by nan"):
        agreement.must_agree({"value": np.array([1.0, -4.0, np.nan])}, right, "float32")


def test_bars_compare_with_the_better_of_the_dense_peers_and_show_the_largest_error():
    sizes = of_head(TOY)
    dpo = {"row": "dpo", "case": sizes, "values": {"ours": [6.0], "Keras, graph": [12.0], "Keras, XLA": [8.0]}}
    errors = [{"row": "accuracy", "case": sizes, "values": {"ours": [error]}} for error in (5e-7, 2e-6)]
    by_text = {bar.text: bar for bar in bars_of_outputs.BARS}
    found = {"rows": [dpo, *errors]}
    assert by_text["DPO: ours / through dense logits, the better of graph and XLA"].number(found) == 0.75
    assert by_text["DPO: ours / through dense logits, JAX"].number({"rows": []}) is None
    worst = by_text["largest error of three outputs and their gradients, in millionths"]
    assert worst.number(found) == pytest.approx(2.0)
    assert worst.met(2.0) == "no"


def test_what_does_other_work_is_not_the_best():
    values = {"ours": [2.0], "ours, labels": [1.0], "Keras": [3.0]}
    record = {"row": "gpu-outputs", "case": {"output": "DPO", "beside": ["ours, labels"]}, "unit": "milliseconds"}
    record |= {"rounds": 1, "peers": list(values), "values": values, "missing": {}}
    line = tables.table({"rows": [record]}, "gpu-outputs").splitlines()[-1]
    assert line == "| DPO | **2** | 1 (0.50) | 3 (1.50) |"


def test_an_error_is_shown_without_a_ratio():
    record = {"row": "accuracy", "case": {"output": "entropy"}, "unit": "error", "rounds": 1}
    record |= {"peers": ["ours", "ours, JAX"], "values": {"ours": [4.88e-7], "ours, JAX": [3e-7]}, "missing": {}}
    assert tables.table({"rows": [record]}, "accuracy").splitlines()[-1].endswith("| entropy | 4.88e-07 | 3e-07 |")


def test_only_the_peers_of_named_libraries_are_measured():
    work = Work("dpo", {}, {"ours": "tensorflow", "ours, JAX": "jax", "Keras, graph": "tensorflow"})
    assert list(work.of_libraries(["tensorflow"]).peers) == ["ours", "Keras, graph"]


def test_a_process_reads_no_programs_of_earlier_runs(monkeypatch):
    """Its first steps and its memory are to have the compiler's."""
    monkeypatch.setenv("TF_XLA_FLAGS", "--tf_xla_persistent_cache_directory=/nowhere")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/nowhere")
    worker = Worker(Library("tests.bench.environment"))
    try:
        found = worker.versions()
    finally:
        worker.end()
    assert "PATH" in found and not {"TF_XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR"} & set(found)
