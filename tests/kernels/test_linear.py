"""Facts of the linear kernel."""

import itertools

import numpy as np
import pytest
from keras import ops

from keras_xent.kernels import linear_cross_entropy, linear_token_statistics
from tests import oracles
from tests.backend import MODES, every_mode, to_numpy, value_and_gradient
from tests.kernels.linear_examples import (
    CLASSES,
    NAN,
    OPTIONS,
    TOKENS,
    assert_near,
    cross_entropy,
    example,
    oracle,
    run,
    set_small_chunks,
)
from tests.tiers import fast_for, whole


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    set_small_chunks(monkeypatch)


@whole
def test_the_loss_is_minus_the_logarithm_of_the_probability():
    kernel = np.log([[0.2, 0.8], [0.5, 0.5]])
    losses = to_numpy(linear_cross_entropy(np.eye(2), kernel, [1, 0]))
    np.testing.assert_allclose(losses, -np.log([0.8, 0.5]), rtol=2e-6)


@whole
def test_uniform_logits_cost_log_num_classes():
    losses = to_numpy(linear_cross_entropy(np.zeros((5, 3)), np.ones((3, CLASSES)), np.arange(5)))
    np.testing.assert_allclose(losses, np.full(5, np.log(CLASSES)), rtol=2e-6)


@fast_for("token_mean-xla", "token_mean-jit")
@every_mode
@pytest.mark.parametrize("reduction", ["none", "token_mean"])
def test_masked_tokens_leave_no_trace(reduction, mode):
    hidden, kernel, bias, labels = example()
    mask = np.random.default_rng(1).uniform(size=TOKENS) < 0.3
    # Whole chunks of tokens that do not count, and the last one counts alone in its chunk.
    mask[20:60], mask[-1] = False, True
    dirty = np.where(mask[:, None], hidden, np.resize([NAN, float("inf"), 1e30], (TOKENS, 1)))
    share = mask / mask.sum() if reduction == "token_mean" else 1.0 * mask
    losses, expected = oracle(hidden, kernel, bias, labels, share)
    f = cross_entropy(labels, mask=mask, reduction=reduction)
    value, gradients = run(f, (dirty, kernel, bias), mode=mode)
    kept = np.where(mask, losses, 0)
    assert_near([value], [kept.sum() / mask.sum() if reduction == "token_mean" else kept])
    assert_near(gradients, expected)
    assert (gradients[0][~mask] == 0).all()


@every_mode
def test_where_no_token_is_valid_loss_and_gradient_are_exactly_zero(mode):
    hidden, kernel, bias, labels = example()
    f = cross_entropy(labels, mask=np.zeros(TOKENS, bool), reduction="token_mean")
    value, gradients = run(f, (hidden, kernel, bias), mode=mode)
    assert value == 0
    assert all((g == 0).all() for g in gradients)


def test_ignored_labels_may_be_out_of_range():
    hidden, kernel, _, labels = example()
    labels[::3] = -100
    losses = to_numpy(linear_cross_entropy(hidden, kernel, labels, ignore_class=-100))
    assert (losses[::3] == 0).all()
    np.testing.assert_allclose(losses[1], oracles.sparse(labels[1:2], (hidden @ kernel)[1:2])[0][0], rtol=2e-6)


def test_an_out_of_range_label_is_named():
    hidden, kernel, _, labels = example()
    labels[4] = CLASSES
    with pytest.raises(ValueError, match=f"^`labels` must be classes from 0 to {CLASSES - 1}"):
        linear_cross_entropy(hidden, kernel, labels)


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode not in ("eager", "graph")])
def test_an_out_of_range_label_is_nan_inside_xla(mode):
    hidden, kernel, bias, labels = example(tokens=9)
    labels[4] = CLASSES
    f = cross_entropy(ops.convert_to_tensor(labels))
    value, (for_hidden, _, _) = run(f, (hidden, kernel, bias), mode=mode)
    assert np.isnan(value).tolist() == [i == 4 for i in range(9)]
    assert np.isnan(for_hidden).all(axis=1).tolist() == [i == 4 for i in range(9)]


def test_mismatched_shapes_are_refused_with_both_shapes():
    hidden, kernel, bias, labels = example()
    with pytest.raises(ValueError) as error:
        linear_cross_entropy(hidden, kernel.T, labels)
    assert str(error.value) == (
        "`hidden` must have shape [..., D] and `kernel` [D, V] (transpose_kernel=False). Received: hidden of shape "
        "(101, 7) and kernel of shape (37, 7). For a kernel that lies the other way change `transpose_kernel`."
    )
    with pytest.raises(ValueError) as error:
        linear_cross_entropy(hidden, kernel, labels, bias[:-1])
    assert str(error.value) == (
        "`bias` must have shape (37,), one number for each class of the kernel. Received: bias of shape (36,)."
    )
    with pytest.raises(ValueError) as error:
        linear_cross_entropy(hidden, kernel, labels[:-1])
    assert str(error.value) == (
        "`labels` must have the shape of `hidden` without its last axis, one integer for each token. Received: labels "
        "of shape (100,) and hidden of shape (101, 7)."
    )


# Statistics.


def ranks(logits, labels):
    """The place of each label in the stable order of the logits, largest first."""
    return (np.argsort(-logits, axis=1, kind="stable") == labels[:, None]).argmax(1)


def test_statistics_are_the_plain_cross_entropy_and_the_rank_of_the_label():
    hidden, kernel, bias, labels = example()
    labels[:50] = (hidden @ kernel + bias)[:50].argmax(1)
    mask = np.random.default_rng(7).uniform(size=TOKENS) < 0.6
    _, known = linear_cross_entropy(
        hidden, kernel, labels, bias, mask=mask, reduction="sum", **OPTIONS["all"], return_statistics=["rank"]
    )
    capped = 5.0 * np.tanh((hidden @ kernel + bias) / 5.0)
    np.testing.assert_allclose(to_numpy(known.nll), np.where(mask, oracles.sparse(labels, capped)[0], 0), rtol=1e-5)
    assert to_numpy(known.rank).tolist() == np.where(mask, ranks(hidden @ kernel + bias, labels), 0).tolist()


def test_statistics_and_gradients_are_exact_where_the_model_is_sure():
    logits = np.array([[40.0, 0.0, 0.0], [0.0, 0.0, 40.0], [5.0, 5.0, 5.0], [0.0, 200.0, -1e30]], "float32")
    labels, tail, third = np.array([0, 0, 1, 1]), np.exp(-40.0), 1 / 3
    names = ("rank", "entropy", "logsumexp", "confidence", "hit")

    def loss(hidden):
        total, statistics = linear_cross_entropy(
            hidden, np.eye(3, dtype="float32"), labels, reduction="sum", return_statistics=names
        )
        columns = [ops.stop_gradient(getattr(statistics, name)) for name in ("nll", *names)]
        return ops.concatenate([ops.reshape(total, (1,)), *columns])

    values, gradient = value_and_gradient(loss, ops.convert_to_tensor(logits), np.eye(1, 25)[0])
    columns = [
        [2 * tail, 40.0, np.log(3), 0.0],
        [0, 1, 1, 0],
        [82 * tail, 82 * tail, np.log(3), 0.0],
        [40.0, 40.0, 5 + np.log(3), 200.0],
        [1.0, 1.0, third, 1.0],
        [1, 0, 0, 1],
    ]
    found, known = values[1:].reshape(6, 4), np.array(columns)
    np.testing.assert_allclose(found[:, [0, 2, 3]], known[:, [0, 2, 3]], rtol=1e-6)
    np.testing.assert_allclose(found[:, 1], known[:, 1], rtol=1e-6, atol=1e-7)  # sure of another class than the label
    expected = [[-2 * tail, tail, tail], [-1.0, tail, 1.0], [third, third - 1, third], [0.0, 0.0, 0.0]]
    np.testing.assert_allclose(gradient, expected, rtol=1e-6)


@pytest.mark.parametrize("bias", [0.0, -float("inf"), [float("inf"), 0, 0, float("inf")], [0, NAN, 0, 0]])
def test_a_hit_is_a_rank_of_0_also_among_equal_logits(bias):
    logits = np.array(list(itertools.product([0.0, 1.0, 2.0], repeat=4)), "float32")
    logits, labels = np.repeat(logits, 4, axis=0), np.tile(np.arange(4), len(logits))  # all labels of all rows
    _, found = linear_cross_entropy(
        logits, np.eye(4, dtype="float32"), labels, np.zeros(4) + bias, return_statistics=("hit", "rank")
    )
    assert to_numpy(found.hit).tolist() == (to_numpy(found.rank) == 0).tolist()
    assert bias != 0.0 or to_numpy(found.hit).tolist() == (logits.argmax(1) == labels).tolist()


@pytest.mark.whole
def test_statistics_are_chosen_by_name():
    hidden, kernel, _, labels = (np.asarray(a) for a in example())
    _, found = linear_cross_entropy(hidden, kernel, labels, return_statistics=("entropy", "rank"))
    everything = linear_token_statistics(hidden, kernel, labels)
    for name in ("entropy", "rank"):
        np.testing.assert_allclose(to_numpy(getattr(found, name)), to_numpy(getattr(everything, name)), rtol=2e-6)
    assert found.logsumexp is None
    with pytest.raises(ValueError, match=r"`return_statistics` must be .* 'confidence'. Received: 'perplexity'"):
        linear_cross_entropy(hidden, kernel, labels, return_statistics=["perplexity"])


@whole
def test_of_equal_logits_the_first_has_rank_0():
    _, known = linear_cross_entropy(np.zeros((3, 2)), np.ones((2, 4)), [0, 1, 3], return_statistics=["rank"])
    assert to_numpy(known.rank).tolist() == [0, 1, 3]


def test_unknown_gradients_and_single_factors_are_refused():
    hidden, kernel = np.ones((2, 3), "float32"), np.ones((3, 5), "float32")
    with pytest.raises(ValueError, match=r"`gradients` must hold names among 'hidden', .* gradients=\('hiden',\)"):
        linear_cross_entropy(hidden, kernel, [0, 1], gradients=("hiden",))
    with pytest.raises(ValueError, match="`low_rank` must be a pair of factors. Received: tuple"):
        linear_cross_entropy(hidden, kernel, [0, 1], low_rank=(kernel,))
