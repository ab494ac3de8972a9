"""`tools/fuzz`: it runs, counts its cases, and finds a fault that was put into a kernel."""

import numpy as np
import pytest
from keras import ops

from keras_xent import kernels
from tests.backend import TWO_MODES
from tests.tiers import fast_for
from tools.fuzzing import calls, checking, running
from tools.fuzzing import kernels as fuzzed
from tools.fuzzing.exploring import Explorer

ROWS = 400


def program(kernel="sparse_softmax", shape=(ROWS, 7), mode="eager", given=(), **options):
    return calls.Program(kernel, mode, "float32", shape, tuple(sorted(options.items())), frozenset(given))


def drawn(program, seed=0):
    return fuzzed.draw_call(np.random.default_rng(seed), program)


@pytest.mark.whole
@pytest.mark.parametrize("kernel", fuzzed.KERNELS)
def test_a_call_of_each_kernel_is_right(kernel):
    shape = (9, 11) if kernel == "reduction" else fuzzed.KERNELS[kernel].shapes[0]
    call = drawn(program(kernel, shape, given=("mask", "valid")), seed=2)
    number, failures = checking.check(call, running.run)
    assert not failures
    numbers = {"sparse_softmax": ROWS, "softmax": ROWS, "sigmoid": 500, "reduction": 1, "linear_sequence_loss": 27}
    assert number == numbers.get(kernel, 160)


def test_cases_are_counted_by_row(tmp_path):
    explorer = Explorer(0, tmp_path, ["sparse_softmax"])
    explorer._programs["sparse_softmax"] = [program(given=("mask",))]
    for seed in range(3):
        explorer._rng = np.random.default_rng(seed + 100)
        explorer._program = lambda name: explorer._programs[name][0]
        assert not list(explorer.step())
    assert explorer.cases == explorer.by_kernel["sparse_softmax"] <= 3 * ROWS and explorer.calls == 3


def test_a_planted_fault_is_found_made_small_and_saved(tmp_path, monkeypatch):
    kernel = kernels.sparse_softmax_cross_entropy

    def faulty(labels, logits, **options):
        losses = kernel(labels, logits, **options)
        # One class is forgotten where it is the label.
        return ops.where(ops.equal(ops.cast(labels, "int32"), 3), ops.zeros_like(losses), losses)

    monkeypatch.setattr(kernels, "sparse_softmax_cross_entropy", faulty)
    running._step.cache_clear()
    explorer = Explorer(0, tmp_path, ["sparse_softmax"])
    monkeypatch.setattr(explorer, "_program", lambda name: program(given=("class_weight",), z_loss=0.1))
    lines = list(explorer.step())
    (path,) = explorer.failures
    assert any("value 0" in line for line in lines) and f"tools/fuzz --replay {path}" in lines[-1]
    call, backend = calls.load(path)
    # Neither the option nor the weights have to do with it, and one row is enough.
    assert backend == running.BACKEND and call.program.options == () and "class_weight" not in call.arrays
    assert call.arrays["labels"].tolist() == [3] and path.stat().st_size < 3000
    assert checking.check(call, running.run)[1]
    monkeypatch.undo()
    running._step.cache_clear()
    assert not checking.check(call, running.run)[1]


@pytest.mark.parametrize("mode", [m for m in running.MODES if m in ("eager", "graph", "jit", "xla")])
def test_a_label_out_of_range_counts_as_one_error_where_it_raises(mode):
    call = drawn(program(mode=mode))
    call.arrays["labels"] = np.where(np.arange(ROWS) == 5, 7, np.arange(ROWS) % 7).astype("int32")
    number, failures = checking.check(call, running.run)
    assert not failures and number == (1 if mode in ("eager", "graph") else ROWS)


@pytest.mark.parametrize("mode", [m for m in running.MODES if m not in ("eager", "graph")])
@pytest.mark.parametrize("kernel", ["sparse_softmax", "linear"])
def test_a_label_out_of_range_is_nan_where_class_0_has_weight_0(kernel, mode):
    shape = (ROWS, 7) if kernel == "sparse_softmax" else fuzzed.KERNELS[kernel].shapes[0]
    call = drawn(program(kernel, shape, mode=mode, given=("class_weight",)))
    call.arrays["class_weight"][0] = 0.0
    call.arrays["labels"][:2] = -5, 100
    assert not checking.check(call, running.run)[1]


def naive(logits, targets):
    """Losses and gradients in float32, as a textbook has them."""
    x = logits - logits.max(1, keepdims=True)
    log_p = x - np.log(np.exp(x).sum(1, keepdims=True))
    return -(targets * log_p).sum(1), targets.sum(1, keepdims=True) * np.exp(log_p) - targets


@fast_for("sparse_softmax")
@pytest.mark.parametrize("kernel", ["softmax", "sparse_softmax", "linear", "linear_softmax"])
def test_tolerances_are_a_small_multiple_of_the_error_of_naive_code(kernel):
    call = drawn(program(kernel, fuzzed.KERNELS[kernel].shapes[2], mode=TWO_MODES[1]), seed=2)
    arrays, is_linear = call.arrays, "linear" in kernel
    if "labels" in arrays:
        arrays["labels"] = np.abs(arrays["labels"].astype("int64")) % call.program.shape[-1]
    with np.errstate(all="ignore"):
        expected = fuzzed.KERNELS[kernel].expected(call)
        logits = arrays["hidden"] @ arrays["kernel"] if is_linear else arrays["logits"]
        targets = arrays["targets"] if "targets" in arrays else np.eye(logits.shape[-1])[arrays["labels"]]
        losses, gradients = naive(logits.astype("float32"), targets.astype("float32"))
        gradients = gradients * arrays["upstream"].astype("float32")[:, None]
        name = "hidden" if is_linear else "logits"
        gradients = gradients @ arrays["kernel"].astype("float32").T if is_linear else gradients
        for found, limits in (losses, expected.values[0]), (gradients, expected.gradients[name]):
            share = np.abs(found - limits.value) / limits.tolerance
            assert np.nanmax(np.where(np.isfinite(share), share, 0)) > 1 / 40
