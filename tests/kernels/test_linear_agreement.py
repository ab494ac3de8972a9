"""The linear kernel agrees with the oracle, in the gradient of every input."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

from keras_xent.kernels import linear_cross_entropy, sparse_softmax_cross_entropy
from tests.backend import MODES, every_mode, skip_on_accelerator, tensor, to_numpy
from tests.internals import REDUCTIONS
from tests.kernels.linear_examples import (
    CLASSES,
    FEATURES,
    OPTIONS,
    TOKENS,
    WEIGHTS,
    assert_near,
    cross_entropy,
    example,
    oracle,
    run,
    set_small_chunks,
)
from tests.tiers import fast_for, sample, whole


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    set_small_chunks(monkeypatch)


@fast_for("*-all-True")
@pytest.mark.parametrize(
    "options, transpose",
    sample(
        [*[(name, False) for name in OPTIONS], ("plain", True), ("all", True)],
        [("plain", False), ("all", False), ("all", True)],
    ),
)
@every_mode
def test_values_and_gradients_agree_with_the_oracle(mode, options, transpose):
    options = OPTIONS[options]
    hidden, kernel, bias, labels = example()
    upstream = np.random.default_rng(1).uniform(-1, 2, TOKENS)
    losses, expected = oracle(hidden, kernel, bias, labels, upstream, **options)
    if transpose:
        kernel, expected[1] = kernel.T, expected[1].T
    f = cross_entropy(labels, transpose_kernel=transpose, **options)
    value, gradients = run(f, (hidden, kernel, bias), upstream, mode)
    assert_near([value, *gradients], [losses, *expected])


REDUCED = [reduction for reduction in REDUCTIONS if reduction not in ("none", None)]


def reduced(losses, weights, label_weights, shape, reduction):
    """The shares of the tokens in a reduced loss, by the definitions, in NumPy."""
    valid = np.ones(shape)
    w, c = weights.reshape(shape), label_weights.reshape(shape)
    if reduction in ("sum_over_batch_size", "mean"):
        share = w / valid.sum()
    elif reduction == "mean_with_sample_weight":
        share = w / w.sum()
    elif reduction == "sum":
        share = w
    elif reduction == "token_mean":
        share = w / (w * c).sum()
    else:
        share = w / (w * c).sum(1, keepdims=True) / shape[0]
    return (share.ravel() * losses).sum(), share.ravel()


@fast_for("token_mean-*", "sequence_mean-*")
@pytest.mark.parametrize(
    "reduction, training",
    sample(
        [(r, training) for r in REDUCED for training in (True, False)],
        [*[(r, True) for r in REDUCED], ("token_mean", False)],
    ),
)
def test_every_reduction_has_the_gradient_of_its_definition(reduction, training):
    hidden, kernel, bias, labels = example(tokens=100)
    weights = np.random.default_rng(2).uniform(0.1, 2, 100)
    losses, _ = oracle(hidden, kernel, bias, labels, weights, class_weight=WEIGHTS)
    total, share = reduced(losses, weights, np.take(WEIGHTS, labels), (4, 25), reduction)
    _, expected = oracle(hidden, kernel, bias, labels, share, class_weight=WEIGHTS)

    def f(hidden, kernel, bias):
        return 3.0 * linear_cross_entropy(
            ops.reshape(hidden, (4, 25, FEATURES)),
            kernel,
            labels.reshape(4, 25),
            bias,
            token_weights=weights.reshape(4, 25),
            class_weight=WEIGHTS,
            reduction=reduction,
            training=training,
        )

    value, gradients = run(f, (hidden, kernel, bias))
    assert_near([value, *gradients], [3 * total, *[3 * e for e in expected]])


@fast_for("xla", "jit")
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_gives_the_same(mode):
    hidden, kernel, bias, labels = example()
    mask = np.random.default_rng(3).uniform(size=TOKENS) < 0.5
    share = mask / mask.sum()
    losses, expected = oracle(hidden, kernel, bias, labels, share, **OPTIONS["all"])
    f = cross_entropy(labels, mask=mask, reduction="mean", **OPTIONS["all"])
    value, gradients = run(f, (hidden, kernel, bias), mode=mode)
    assert_near([value, *gradients], [(share * losses).sum(), *expected])


@fast_for("17-*")
@pytest.mark.parametrize("reduction", sample(["none", "sum"], ["sum"]))
@pytest.mark.parametrize(
    "tokens, features, classes",
    sample(
        [(0, 3, 5), (1, 1, 1), (1, 4, 37), (7, 1, 37), (8, 5, 37), (9, 5, 37), (33, 3, 1), (17, 6, 38), (16, 2, 11)],
        [(0, 3, 5), (1, 1, 1), (33, 3, 1), (17, 6, 38)],
    ),
)
def test_sizes_that_no_chunk_divides(tokens, features, classes, reduction):
    hidden, kernel, bias, labels = example(1, tokens, features, classes)
    losses, expected = oracle(hidden, kernel, bias, labels, np.ones(tokens))
    f = cross_entropy(labels, reduction=reduction)
    value, gradients = run(f, (hidden, kernel, bias))
    assert_near([value, *gradients], [losses if reduction == "none" else losses.sum(), *expected])


@pytest.mark.whole
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_an_upstream_gradient_of_0_gives_0_even_where_there_is_no_gradient(reduction):
    """Two logits of +inf have no gradient."""
    inputs = [[1e20, 0.0], [0.0, 1.0]], [[1e30, 1e30], [0.3, 0.2]], [0.0, 0.0]
    f = cross_entropy(np.array([0, 1]), reduction=reduction)
    for upstream in 0.0, 1.0:
        _, gradients = run(lambda *arrays: upstream * ops.sum(f(*arrays)), inputs, dtype="float32")  # noqa: B023
        assert all((np.isfinite(g).all() and not g.any()) == (upstream == 0) for g in gradients)


@pytest.mark.whole
@pytest.mark.parametrize(
    "wanted",
    [("hidden",), *[pytest.param(names, marks=whole) for names in (("kernel",), ("bias",), ("hidden", "bias"))]],
)
def test_inputs_that_need_no_gradient_have_none(wanted):
    hidden, kernel, bias, labels = example()
    _, expected = oracle(hidden, kernel, bias, labels, np.ones(TOKENS))
    for reduction in ("sum", "none"):
        f = cross_entropy(labels, reduction=reduction, gradients=wanted)
        _, gradients = run(f, (hidden, kernel, bias))
        names = ("hidden", "kernel", "bias")
        assert_near(gradients, [e if n in wanted else 0 * e for n, e in zip(names, expected, strict=True)])


def test_token_weights_have_a_gradient():
    hidden, kernel, bias, labels = example()
    weights = np.random.default_rng(6).uniform(0.5, 2, TOKENS)
    losses, _ = oracle(hidden, kernel, bias, labels, weights)
    f = lambda w: linear_cross_entropy(hidden, kernel, labels, bias, token_weights=w, reduction="token_mean")  # noqa: E731
    value, (gradient,) = run(f, (weights,))
    mean = (weights * losses).sum() / weights.sum()
    # Through the losses' weights and through what they are divided by.
    np.testing.assert_allclose(value, mean, rtol=2e-6)
    np.testing.assert_allclose(gradient, (losses - mean) / weights.sum(), atol=2e-6 * np.abs(losses).max())


@pytest.mark.parametrize("transpose", [False, True])
def test_rounding_to_a_digit_of_the_label_is_not_added_up_over_many_classes(transpose):
    skip_on_accelerator("the label's gradient is in the product with the kernel there")
    rng = np.random.default_rng(2)
    hidden, labels = rng.standard_normal((16, 8)).astype("float32"), rng.integers(0, 8000, 16)
    kernel = 0.1 * rng.standard_normal((8, 8000)).astype("float32")
    logits = hidden.astype("float64") @ kernel
    d_logits = np.exp(logits) / np.exp(logits).sum(1, keepdims=True) - np.eye(8000)[labels]
    expected = [d_logits @ kernel.T, hidden.T @ d_logits]
    if transpose:
        kernel, expected[1] = kernel.T, expected[1].T
    f = cross_entropy(labels, transpose_kernel=transpose, reduction="sum")
    _, (*gradients, _) = run(f, (hidden, kernel, np.zeros(8000)), dtype="float32")
    for gradient, reference, limit in zip(gradients, expected, (2e-7, 5e-7), strict=True):
        # Of a dense product of 8000 classes the gradient of the hidden states is 1e-6 off.
        assert abs(gradient - reference).max() < limit * abs(reference).max()


@pytest.mark.whole
@pytest.mark.parametrize("dtype", sample(["bfloat16", "float16"], ["bfloat16"]))
def test_16_bit_inputs_cost_no_more_than_the_naive_computation(dtype):
    *matrices, labels = example()
    hidden, kernel, bias = (to_numpy(tensor(x, dtype)) for x in matrices)
    upstream = np.random.default_rng(1).uniform(0.5, 2, TOKENS)
    _, exact = oracle(hidden, kernel, bias, labels, upstream)
    ours = run(lambda h, k, b: linear_cross_entropy(h, k, labels, b), (hidden, kernel, bias), upstream, dtype=dtype)[1]

    def naive(hidden, kernel, bias):
        return sparse_softmax_cross_entropy(labels, ops.matmul(hidden, kernel) + bias)

    theirs = run(naive, (hidden, kernel, bias), upstream, dtype=dtype)[1]
    for mine, other, right in zip(ours, theirs, exact, strict=True):
        assert np.abs(mine - right).max() <= np.abs(other - right).max() + 2.0**-8 * np.abs(right).max()


@pytest.mark.whole
def test_small_weights_do_not_vanish_in_float16():
    """The gradient is formed before the division by the number of tokens, which would take it below float16."""
    hidden, kernel, _, labels = example(tokens=4000)
    f = lambda h, k: 2.0**15 * linear_cross_entropy(h, k, labels, reduction="token_mean")  # noqa: E731
    _, (gradient, _) = run(f, (hidden, kernel), dtype="float16")
    _, expected = oracle(hidden, kernel, np.zeros(CLASSES), labels, np.full(4000, 2.0**15 / 4000))
    np.testing.assert_allclose(gradient, expected[0], atol=2**-9 * np.abs(expected[0]).max())


# Any shape, any options, any labels.


@st.composite
def problems(draw):
    tokens, features, classes = draw(st.integers(0, 20)), draw(st.integers(1, 4)), draw(st.integers(1, 40))
    options = {
        "label_smoothing": draw(st.sampled_from([0.0, 0.1, 1.0])),
        "z_loss": draw(st.sampled_from([0.0, 0.1])),
        "logit_softcap": draw(st.sampled_from([None, 2.0])),
    }
    seed, mask = draw(st.integers(0, 2**20)), draw(st.sampled_from(["all", "some", "none"]))
    return tokens, features, classes, options, seed, mask


@whole
@settings(max_examples=10, deadline=None, derandomize=True)
@given(problems())
def test_any_problem_agrees_with_the_oracle(problem):
    tokens, features, classes, options, seed, masked = problem
    hidden, kernel, bias, labels = example(seed, tokens, features, classes)
    mask = {"all": np.ones(tokens, bool), "none": np.zeros(tokens, bool)}.get(
        masked, np.random.default_rng(seed).uniform(size=tokens) < 0.5
    )
    losses, expected = oracle(hidden, kernel, bias, labels, 1.0 * mask, **options)
    f = cross_entropy(labels, mask=mask, reduction="sum", **options)
    value, gradients = run(f, (hidden, kernel, bias))
    assert_near([value, *gradients], [losses[mask].sum(), *expected])
