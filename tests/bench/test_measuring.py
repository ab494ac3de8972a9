"""What tools/bench does before and while it takes times."""

import time
from pathlib import Path

import numpy as np
import pytest

from tests import oracles
from tests.tiers import whole
from tools.bench import agreement, data, measuring, rows
from tools.bench.shapes import Head, Shape
from tools.bench.worker import Worker as InProcess
from tools.bench.workers import LIBRARIES, Library, Missing, Worker, Workers

TOY = Shape("toy", 24, 40)
OF_NUMPY = {"numpy": Library("tests.bench.liar"), "missing": Library("tests.bench.liar", folder=".venv-of-nobody")}


@pytest.fixture(scope="module")
def numpy_workers():
    with Workers(OF_NUMPY) as workers:
        yield workers


def measured(workers, *names, loss="sparse", **libraries):
    peers = dict.fromkeys(names, "numpy") | libraries
    return measuring.record(rows.Work(loss, rows.of_loss(loss, TOY, "float32"), peers), workers, rounds=3)


def test_a_peer_that_tells_the_truth_is_timed_as_often_as_asked(numpy_workers):
    record = measured(numpy_workers, "ours", "another")
    assert {name: len(times) for name, times in record["values"].items()} == {"ours": 3, "another": 3}
    assert record["missing"] == {}


@pytest.mark.parametrize(
    "name, reason",
    [
        ("lies a little", "not the same result: gradient is off by 1.0e-03, and 0.0001 may be"),
        ("says NaN", "not the same result: loss is off by nan, and 2e-05 may be"),
        ("leaves out the gradient", "not the same work: gradient of shape (), not (24, 40)"),
        ("cannot", "NotImplementedError: it cannot"),
        ("dies", "its process ended, with code 3"),
        ("dies later", "its process ended, with code 4"),
    ],
)
def test_a_peer_that_does_not_do_the_work_is_not_timed_and_the_reason_is_kept(numpy_workers, name, reason):
    record = measured(numpy_workers, "another", name)
    assert record["missing"] == {name: reason}
    assert {name: len(times) for name, times in record["values"].items()} == {"another": 3}


def test_a_wrong_answer_of_ours_ends_the_measurement(numpy_workers):
    with pytest.raises(
        agreement.Disagreement,
        match="^ours, lies a little: not the same result: gradient is off by 1.0e-03, and 0.0001 may be$",
    ):
        measured(numpy_workers, "another", "ours, lies a little")


def test_a_library_that_is_not_installed_is_missing_with_the_reason(numpy_workers):
    record = measured(numpy_workers, "ours", PyTorch="missing")
    assert record["missing"] == {"PyTorch": "there is no .venv-of-nobody, which tools/bench/install makes"}
    assert list(record["values"]) == ["ours"]


def test_peers_take_turns_and_each_is_first_as_often():
    called = []
    calls = {name: lambda name=name: called.append(name) or 1.0 for name in "ABC"}
    times, _ = measuring.in_turn(calls, rounds=3, warm_up=1, workers=Workers({}))
    assert "".join(called) == "BCA" + "CAB" + "ABC" + "BCA"
    assert times == dict.fromkeys("ABC", [1.0] * 3)


@pytest.mark.parametrize("question", ["loss", "linear"])
def test_of_large_gradients_the_first_rows_are_compared(tmp_path, question):
    case = rows.of_loss("sparse", TOY, "float32") if question == "loss" else rows.of_head(Head("toy", 24, 6, 40), 0.5)
    data.write(case, tmp_path)
    whole_results = agreement.reference(case, tmp_path)
    part = agreement.reference(case | {"compared": 5}, tmp_path)
    assert part.pop("loss") == whole_results["loss"]
    for name, gradient in part.items():
        np.testing.assert_allclose(gradient, whole_results[name][:5], rtol=1e-6, atol=1e-12)


def test_queued_calls_are_timed_together():
    worker = InProcess("tests.bench.liar")
    calls = []

    class Call:
        def launch(self):
            calls.append("launch")

        def __call__(self):
            calls.append("call")
            time.sleep(0.02)
            return {}

    worker._calls["queued"], worker._cases["queued"] = Call(), {"queued": 4}
    assert 5 <= worker.time("queued") < 20
    assert calls == ["launch"] * 3 + ["call"]


def test_a_process_that_waits_takes_no_time_and_one_that_sleeps_is_timed(numpy_workers, tmp_path):
    case = rows.of_loss("sparse", TOY, "float32")
    data.write(case, tmp_path)
    worker = numpy_workers["numpy"]
    worker.make("sleeps", case, str(tmp_path))
    assert worker.time("sleeps") >= 50
    before = worker.processor_seconds()
    time.sleep(0.3)
    assert worker.processor_seconds() - before < 0.003


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("loss", ["sigmoid", "dense", "sparse"])
def test_what_peers_are_compared_with_is_right(loss, smoothing, tmp_path):
    case = rows.of_loss(loss, TOY, "float32", smoothing)
    data.write(case, tmp_path)
    found = agreement.reference(case, tmp_path)
    given = data.read(tmp_path, "labels" if loss == "sparse" else "targets")
    by_oracle = {"sparse": oracles.sparse, "dense": oracles.softmax, "sigmoid": oracles.sigmoid}[loss]
    losses, gradients, *_ = by_oracle(given, data.read(tmp_path, "logits"), label_smoothing=smoothing)
    np.testing.assert_allclose(found["loss"], losses.mean(), rtol=1e-12)
    np.testing.assert_allclose(found["gradient"], gradients / losses.size, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("valid", [1.0, 0.5])
def test_what_heads_are_compared_with_is_right(valid, tmp_path):
    case = rows.of_head(Head("toy", 12, 5, 40), valid)
    data.write(case, tmp_path)
    hidden, kernel, labels = (data.read(tmp_path, name).copy() for name in ("hidden", "kernel", "labels"))
    assert (labels != data.IGNORED).sum() == 12 * valid
    chosen = labels != data.IGNORED
    logits = hidden.astype("float64") @ kernel.astype("float64")
    losses, gradients = oracles.sparse(labels[chosen], logits[chosen])
    found = agreement.reference(case, tmp_path)
    np.testing.assert_allclose(found["loss"], losses.mean(), rtol=1e-12)
    for_kernel = hidden[chosen].astype("float64").T @ gradients / chosen.sum()
    np.testing.assert_allclose(found["kernel"], for_kernel, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(
        found["hidden"][chosen], gradients @ kernel.T.astype("float64") / chosen.sum(), rtol=1e-9
    )
    assert (found["hidden"][~chosen] == 0).all()


@whole
def test_the_real_peers_do_the_same_work():
    """A row of losses and one of a head, with every peer that is there, as the command measures them.

    Without torch.compile, whose first compilation takes half a minute.
    """
    of_losses, of_heads = (
        {name: library for name, library in peers.items() if name != "torch.compile"}
        for peers in (rows.OF_LOSSES, rows.OF_HEADS)
    )
    with Workers() as workers:
        loss = measuring.record(rows.Work("sparse", rows.of_loss("sparse", TOY, "float32"), of_losses), workers, 1)
        head = measuring.record(rows.Work("linear", rows.of_head(Head("toy", 24, 8, 40)), of_heads), workers, 1)
    absent = {name for name, library in LIBRARIES.items() if library.folder and not Path(library.folder).exists()}
    for record, peers in (loss, of_losses), (head, of_heads):
        expected = {name for name, library in peers.items() if library not in absent}
        assert set(record["values"]) == expected, record["missing"]
        assert set(record["missing"]) == set(peers) - expected
        assert all(0 < times[0] < 60_000 for times in record["values"].values())


def test_memory_is_that_of_a_fresh_process(tmp_path):
    worker = Worker(OF_NUMPY["numpy"])
    try:
        case = rows.of_loss("sparse", Shape("toy", 2000, 1000), "float32")
        data.write(case, tmp_path)
        worker.make("lies a little", case, str(tmp_path))
        # The copy of the gradient: 8 MB.
        assert 7 <= worker.peak("lies a little", 1) <= 40
        with pytest.raises(Missing, match="^KeyError: 'nobody'$"):
            worker.time("nobody")
    finally:
        worker.end()
