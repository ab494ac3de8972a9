"""The likeliest classes of tokens: a float64 oracle, closed-form values, and what is at the edges."""

import re

import numpy as np
import pytest

from keras_xent.kernels import linear_top_k, linear_top_k_distillation
from tests.backend import DTYPES, MODES, TWO_MODES, optimized_hlo, tensor, to_numpy, with_gradients
from tests.internals import set_sizes
from tests.tiers import fast_for

TOKENS, FEATURES, CLASSES, K = 29, 6, 23, 5
RNG = np.random.default_rng(8)
HIDDEN = RNG.standard_normal((TOKENS, FEATURES)).astype("float32")
KERNEL = RNG.standard_normal((FEATURES, CLASSES)).astype("float32")
BIAS = RNG.standard_normal(CLASSES).astype("float32")
FACTORS = RNG.standard_normal((FEATURES, 2)).astype("float32"), RNG.standard_normal((2, CLASSES)).astype("float32")
MASK = RNG.random(TOKENS) < 0.6
NAN, INFINITY = float("nan"), float("inf")


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 8 tokens made of blocks of 2: nothing divides anything."""
    set_sizes(monkeypatch.setattr, fewest_rows=1, chunk_bytes=4 * CLASSES * 8, block_bytes=4 * CLASSES * 2)


def oracle(hidden, kernel, bias, k=K, *, temperature=1.0, softcap=None):
    hidden, kernel, bias = (np.asarray(a, "float64") for a in (hidden, kernel, bias))
    x = hidden @ kernel + bias
    x = (x if softcap is None else softcap * np.tanh(x / softcap)) / temperature
    log_p = x - np.log(np.exp(x).sum(1, keepdims=True))
    ids = np.argsort(-log_p, axis=1, kind="stable")[:, :k]
    return ids, np.take_along_axis(log_p, ids, axis=1)


CASES = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "softcap": {"logit_softcap": 3.0, "temperature": 1.6},
    "mask": {"mask": MASK},
}


@fast_for("softcap-xla", "softcap-jit", "mask-eager")
@pytest.mark.parametrize("mode", TWO_MODES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("small_chunks")
def test_classes_and_log_probabilities_are_those_of_the_oracle(case, mode):
    options = dict(CASES[case])
    valid = options.get("mask", np.ones(TOKENS, bool))
    ids, log_probs = oracle(
        HIDDEN, KERNEL, BIAS, temperature=options.get("temperature", 1.0), softcap=options.get("logit_softcap")
    )
    # What lies under a mask may be anything.
    hidden = np.where(valid[:, None], HIDDEN, np.float32(NAN))
    found = MODES[mode](lambda *inputs: tuple(linear_top_k(inputs[0], inputs[1], K, inputs[2], **options)))
    mine = [to_numpy(one) for one in found(*map(tensor, (hidden, KERNEL, BIAS)))]
    assert mine[0].dtype == np.int32
    np.testing.assert_array_equal(mine[0], np.where(valid[:, None], ids, -1))
    np.testing.assert_allclose(mine[1], np.where(valid[:, None], log_probs, 0), atol=1e-6 * np.abs(log_probs).max())


@pytest.mark.whole
@pytest.mark.parametrize("dtype", [d for d in DTYPES if d != "float32"])
def test_other_dtypes_have_their_own_accuracy(dtype):
    inputs = [tensor(x, dtype) for x in (HIDDEN, KERNEL, BIAS)]
    ids, log_probs = oracle(*map(to_numpy, inputs))
    mine = linear_top_k(inputs[0], inputs[1], K, inputs[2])
    np.testing.assert_array_equal(to_numpy(mine.ids), ids)
    np.testing.assert_allclose(to_numpy(mine.log_probs), log_probs, atol=1e-12 if dtype == "float64" else 4e-6)


def test_all_classes_of_a_tied_kernel_with_factors_are_a_distribution():
    outer, inner = FACTORS
    hidden = HIDDEN.reshape(1, TOKENS, FEATURES)
    mine = linear_top_k(
        hidden, KERNEL.T.copy(), CLASSES, BIAS, transpose_kernel=True, low_rank=(inner.T.copy(), outer.T.copy())
    )
    ids, log_probs = oracle(HIDDEN, KERNEL + outer @ inner, BIAS, CLASSES)
    assert mine.ids.shape == mine.log_probs.shape == (1, TOKENS, CLASSES)
    np.testing.assert_array_equal(to_numpy(mine.ids)[0], ids)
    np.testing.assert_allclose(to_numpy(mine.log_probs)[0], log_probs, atol=1e-6 * np.abs(log_probs).max())
    np.testing.assert_allclose(np.exp(to_numpy(mine.log_probs)).sum(-1), 1, atol=1e-6)


def of_logits(*logits, k=2, **options):
    """The classes and log-probabilities of one token with these logits."""
    found = linear_top_k(np.ones((1, 1), "float32"), np.array([logits], "float32"), k, **options)
    return to_numpy(found.ids)[0].tolist(), to_numpy(found.log_probs)[0].tolist()


def test_of_equal_classes_the_first_comes_first():
    ids, log_probs = of_logits(0, 1, 1, 1)
    assert ids == [1, 2]
    np.testing.assert_allclose(log_probs, -np.log(3 + np.exp(-1)), rtol=1e-6)


@pytest.mark.parametrize("classes", [256, 261, 287])
def test_many_classes_are_found_by_blocks_in_the_order_of_a_stable_sort(classes):
    # Whole numbers, of which many are equal, and a token whose classes all are.
    logits = np.random.default_rng(classes).integers(-4, 5, (7, classes)).astype("float32")
    logits[0] = 1.0
    logits[1, -3:] = 9.0
    ids, log_probs = linear_top_k(np.eye(7, dtype="float32"), logits, 2)
    expected = np.argsort(-logits, axis=1, kind="stable")[:, :2]
    np.testing.assert_array_equal(to_numpy(ids), expected)
    log_p = logits.astype("float64") - np.log(np.exp(logits.astype("float64")).sum(1, keepdims=True))
    np.testing.assert_allclose(to_numpy(log_probs), np.take_along_axis(log_p, expected, 1), rtol=2e-6)


def test_a_sure_token_keeps_the_digits_of_the_rest():
    # 1 - p is 2 e^-30, which the sum with 1 would lose.
    ids, log_probs = of_logits(0, 30, 0)
    assert ids == [1, 0]
    np.testing.assert_allclose(log_probs, [-2 * np.exp(-30.0), -30.0], rtol=1e-6)


def test_large_logits_and_infinities():
    assert of_logits(1e30, 0, 3e30) == ([2, 0], [0.0, pytest.approx(-2e30)])
    assert of_logits(-INFINITY, 4, -INFINITY) == ([1, 0], [0.0, -INFINITY])
    assert of_logits(0, INFINITY, 5) == ([1, 2], [0.0, -INFINITY])
    for row in ((-INFINITY, -INFINITY), (INFINITY, INFINITY), (1.0, NAN)):
        assert np.isnan(of_logits(*row)[1]).all()
    ids, log_probs = of_logits(1e6, 1e6 + 1, temperature=2.0)
    assert ids == [1, 0]
    np.testing.assert_allclose(log_probs, [-np.log1p(np.exp(-0.5)), -0.5 - np.log1p(np.exp(-0.5))], rtol=1e-6)


def test_a_student_equal_to_the_stored_teacher_has_no_loss():
    stored = linear_top_k(HIDDEN, KERNEL, CLASSES, BIAS, temperature=2.0, mask=MASK)
    loss = linear_top_k_distillation(HIDDEN, KERNEL, *stored, BIAS, temperature=2.0, mask=MASK)
    np.testing.assert_allclose(to_numpy(loss), 0, atol=1e-6)


@fast_for("eager-None")
@pytest.mark.parametrize("weight", [None, 3.0])
@pytest.mark.parametrize("mode", TWO_MODES)
def test_a_token_without_a_class_of_the_teacher_counts_in_no_mean(mode, weight):
    """As `top_k_log_probs` stores masked tokens."""
    ids, log_probs = map(to_numpy, linear_top_k(HIDDEN, KERNEL, 2, BIAS, mask=MASK))
    kernel = tensor(0 * KERNEL)  # of a student that guesses
    weights = None if weight is None else np.full(TOKENS, weight, "float32")

    def mean_loss(bias):
        options = {"token_weights": weights, "reduction": "token_mean"}
        return linear_top_k_distillation(HIDDEN, kernel, ids, log_probs, bias, **options)

    value, (gradient,) = MODES[mode](with_gradients(lambda bias: (mean_loss(bias),) * 2))(tensor(0 * BIAS))
    ids, log_p = ids[MASK], log_probs[MASK].astype("float64")
    p = np.zeros((len(ids), CLASSES))
    np.put_along_axis(p, ids, np.exp(log_p), axis=1)
    np.testing.assert_allclose(to_numpy(value[0]), (np.exp(log_p) * (log_p + np.log(CLASSES))).sum(1).mean(), rtol=2e-6)
    expected = (p.sum(1, keepdims=True) / CLASSES - p).mean(0)
    np.testing.assert_allclose(to_numpy(gradient), expected, atol=1e-6 * np.abs(expected).max())


@pytest.mark.whole
@pytest.mark.parametrize("k", [1, K])  # by blocks of classes, and from all
def test_the_largest_are_found_without_a_sort_of_all_classes(k):
    kernel = tensor(np.tile(KERNEL, (1, 7)))
    program = optimized_hlo(lambda hidden, kernel: tuple(linear_top_k(hidden, kernel, k)), tensor(HIDDEN), kernel)
    assert "TopK" in program and not re.search(rf"\d,{7 * CLASSES}\S* sort\(", program)


@pytest.mark.parametrize("dtype", ["int32", "float32"])
def test_a_tensor_of_one_number_is_a_number(dtype):
    found = linear_top_k(HIDDEN, KERNEL, tensor(np.array(K, dtype)))
    np.testing.assert_array_equal(to_numpy(found.ids), to_numpy(linear_top_k(HIDDEN, KERNEL, K).ids))
    with pytest.raises(ValueError, match="`k` must be a whole number of at least 1. Received: k=.*-2"):
        linear_top_k(HIDDEN, KERNEL, tensor(np.array(-2, dtype)))


def test_no_token_gives_empty_arrays():
    found = linear_top_k(HIDDEN[:0], KERNEL, K)
    assert found.ids.shape == found.log_probs.shape == (0, K)


@pytest.mark.parametrize(
    ("k", "options", "sentence"),
    [
        (0, {}, "`k` must be a whole number of at least 1. Received: k=0"),
        (CLASSES + 1, {}, f"`k` must be at most the number of classes, {CLASSES}. Received: k={CLASSES + 1}"),
        (K, {"mask": MASK[1:]}, "`mask` must"),
        (K, {"temperature": 0.0}, "`temperature` must"),
    ],
)
def test_wrong_arguments_are_named(k, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        linear_top_k(HIDDEN, KERNEL, k, **options)
