"""Statistics of tokens: closed-form values, and a float64 oracle for values and for the gradients of each input."""

import numpy as np
import pytest
from keras import ops

import keras_xent as kx
from keras_xent.kernels import linear_token_statistics
from tests.backend import BACKEND, DTYPES, MODES, TWO_MODES, skip_on_accelerator, tensor, to_numpy, with_gradients
from tests.internals import set_sizes
from tests.tiers import fast_for, whole

TOKENS, FEATURES, CLASSES = 29, 6, 23
RNG = np.random.default_rng(4)
HIDDEN = RNG.standard_normal((TOKENS, FEATURES)).astype("float32")
KERNEL = RNG.standard_normal((FEATURES, CLASSES)).astype("float32")
BIAS = RNG.standard_normal(CLASSES).astype("float32")
LABELS = RNG.integers(0, CLASSES, TOKENS)
MASK = RNG.random(TOKENS) < 0.6
UPSTREAM = RNG.standard_normal((3, TOKENS)).astype("float32")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks of 8 tokens made of blocks of 2: nothing divides anything."""
    set_sizes(monkeypatch.setattr, fewest_rows=1, chunk_bytes=4 * CLASSES * 8, block_bytes=4 * CLASSES * 2)


def oracle(hidden, kernel, bias, *, temperature=1.0, softcap=None, mask=None):
    """Values and gradients in float64, by the Jacobian of the softmax written out."""
    hidden, kernel, bias = (np.asarray(a, "float64") for a in (hidden, kernel, bias))
    raw = hidden @ kernel + bias
    x = (raw if softcap is None else softcap * np.tanh(raw / softcap)) / temperature
    lse = np.log(np.exp(x - x.max(1, keepdims=True)).sum(1)) + x.max(1)
    log_p = x - lse[:, None]
    p, one_hot = np.exp(log_p), np.eye(CLASSES)[LABELS]
    entropy = -(p * log_p).sum(1)
    rank = (x > (x * one_hot).sum(1, keepdims=True)).sum(1)
    keep = np.ones(TOKENS) if mask is None else mask.astype("float64")
    values = [(log_p * one_hot).sum(1) * keep, entropy * keep, lse * keep, rank * keep]
    u, v, w = (row[:, None] * keep[:, None] for row in UPSTREAM.astype("float64"))
    d = u * (one_hot - p) - v * p * (log_p + entropy[:, None]) + w * p
    d = d / temperature * (1 if softcap is None else 1 - np.tanh(raw / softcap) ** 2)
    return values, [d @ kernel.T, hidden.T @ d, d.sum(0)]


def run(inputs, mode="eager", dtype=None, **options):
    inputs = tuple(tensor(x, dtype or "float32") for x in inputs)

    def total(*inputs):
        statistics = linear_token_statistics(inputs[0], inputs[1], LABELS, inputs[2], **options)
        weights = [ops.cast(row, statistics[0].dtype) for row in UPSTREAM]
        return sum(ops.sum(a * b) for a, b in zip(weights, statistics[:3], strict=True)), statistics

    (_, statistics), gradients = MODES[mode](with_gradients(total))(*inputs)
    return [to_numpy(s) for s in statistics], [to_numpy(g) for g in gradients]


CASES = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "softcap": {"logit_softcap": 3.0, "temperature": 1.6},
    "mask": {"mask": MASK},
}


@fast_for("softcap-xla", "softcap-jit")
@pytest.mark.parametrize("mode", TWO_MODES)
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_the_oracle(case, mode):
    options = CASES[case]
    named = {"softcap" if name == "logit_softcap" else name: value for name, value in options.items()}
    values, gradients = oracle(HIDDEN, KERNEL, BIAS, **named)
    mine, my_gradients = run((HIDDEN, KERNEL, BIAS), mode, **options)
    for one, other in zip(mine, values, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6 * np.abs(other).max())
    for one, other in zip(my_gradients, gradients, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6 * np.abs(other).max())


if BACKEND == "jax":

    @pytest.mark.parametrize("case", ["plain", "temperature", "softcap"])
    def test_second_derivatives_are_those_of_the_oracle(case):
        """Central differences of its gradients. (On TensorFlow they raise an error.)"""
        import jax

        options, direction = CASES[case], np.random.default_rng(1).standard_normal(HIDDEN.shape)
        named = {"softcap" if name == "logit_softcap" else name: value for name, value in options.items()}
        low, high = (oracle(HIDDEN + step * direction, KERNEL, BIAS, **named)[1][0] for step in (-1e-5, 1e-5))

        def total(hidden):
            values = linear_token_statistics(hidden, KERNEL, LABELS, BIAS, **options)[:3]
            return sum(ops.sum(a * b) for a, b in zip(UPSTREAM, values, strict=True))

        along = jax.jvp(jax.grad(total), (HIDDEN,), (direction.astype("float32"),))[1]
        expected = (high - low) / 2e-5
        np.testing.assert_allclose(along, expected, atol=2e-6 * np.abs(expected).max())


@whole
@pytest.mark.parametrize("dtype", [d for d in DTYPES if d != "float32"])
def test_other_dtypes_have_their_own_accuracy(dtype):
    exact = [to_numpy(tensor(x, dtype)) for x in (HIDDEN, KERNEL, BIAS)]
    values, gradients = oracle(*exact)
    mine, my_gradients = run((HIDDEN, KERNEL, BIAS), dtype=dtype)
    tolerance = 1e-12 if dtype == "float64" else 2**-8
    for one, other in zip(mine[:3] + my_gradients, values[:3] + gradients, strict=True):
        np.testing.assert_allclose(one, other, atol=tolerance * np.abs(other).max())


@pytest.mark.whole
def test_a_tied_kernel_is_the_transposed_one():
    mine = linear_token_statistics(HIDDEN, KERNEL, LABELS)
    tied = linear_token_statistics(HIDDEN, KERNEL.T.copy(), LABELS, transpose_kernel=True)
    for one, other in zip(mine, tied, strict=True):
        np.testing.assert_allclose(to_numpy(one), to_numpy(other), atol=2e-6)


def test_what_is_masked_may_be_anything():
    spoiled = np.where(MASK[:, None], HIDDEN, np.nan)
    statistics, gradients = run((spoiled, KERNEL, BIAS), mask=MASK)
    clean, clean_gradients = run((HIDDEN, KERNEL, BIAS), mask=MASK)
    for one, other in zip(statistics + gradients, clean + clean_gradients, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)
    assert all((s[~MASK] == 0).all() for s in statistics)


def test_a_confident_head_has_log_probability_0_and_never_above():
    logits = np.array([[40.0, 0.0, 0.0], [0.0, 200.0, -np.inf], [5.0, 5.0, 5.0]], "float32")
    statistics = linear_token_statistics(np.eye(3, dtype="float32"), np.nan_to_num(logits, neginf=-1e30), [0, 1, 2])
    log_prob, entropy = to_numpy(statistics.log_prob), to_numpy(statistics.entropy)
    assert (log_prob <= 0).all()
    np.testing.assert_allclose(log_prob, [-2 * np.exp(-40.0), 0.0, -np.log(3)], rtol=1e-6)
    np.testing.assert_allclose(entropy, [2 * 41 * np.exp(-40.0), 0.0, np.log(3)], rtol=1e-6)


def test_log_probabilities_of_large_logits_at_a_temperature_keep_their_digits():
    """The logits are divided after they were subtracted: 1e6 / 0.7 is rounded by 0.06."""
    skip_on_accelerator("logits are divided before they are subtracted there")
    logits = (1e6 + np.array([[0.0, 1.0, -2.0, 3.0], [5.0, 0.0, 1.0, -1.0]])).astype("float32")
    log_probs = linear_token_statistics(np.eye(2, dtype="float32"), logits, [2, 1], temperature=0.7).log_prob
    x = (logits - 1e6).astype("float64") / 0.7
    expected = x - np.log(np.exp(x).sum(1, keepdims=True))
    np.testing.assert_allclose(to_numpy(log_probs), [expected[0, 2], expected[1, 1]], rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("label", [0, 1], ids=["sure of the label", "sure of another"])
def test_the_entropy_of_a_sure_head_has_all_its_digits(label, dtype):
    """By subtracting 1 after the sum, those of another class than the label were up to 5 % off."""
    # Of more than 86, the exponential is below the smallest normal number.
    gaps = np.arange(2.0, 87.0, dtype="float32")
    kernel = np.stack([np.zeros_like(gaps), -gaps, -gaps, -gaps])  # A row of logits for each column.
    s = 3 * np.exp(-gaps.astype("float64"))
    expected = s * gaps / (1 + s) + np.log1p(s)
    hidden, labels = np.eye(len(gaps), dtype="float32"), np.full(len(gaps), label)
    inputs = tensor(hidden, dtype), tensor(kernel.T.copy(), dtype), labels
    of_logits, _ = kx.metrics.Entropy().per_token(labels, inputs[1])
    of_loss = kx.kernels.linear_cross_entropy(*inputs, return_statistics=("entropy",))[1].entropy
    for one in of_logits, of_loss, linear_token_statistics(*inputs).entropy:
        np.testing.assert_allclose(to_numpy(one), expected, rtol=2e-6)
    # A cap rounds the logits, of 86 by up to 8e-6.
    capped = linear_token_statistics(*inputs, logit_softcap=1e9).entropy
    np.testing.assert_allclose(to_numpy(capped), expected, rtol=1e-5)


@whole
def test_minus_infinite_biases_switch_classes_off():
    bias = np.where(np.arange(CLASSES) < 20, BIAS, -np.inf).astype("float32")
    labels = LABELS % 20
    few = linear_token_statistics(HIDDEN, KERNEL[:, :20], labels, BIAS[:20])
    for one, other in zip(linear_token_statistics(HIDDEN, KERNEL, labels, bias), few, strict=True):
        np.testing.assert_allclose(to_numpy(one), to_numpy(other), rtol=1e-6, atol=1e-6)


def test_a_label_out_of_range_is_an_error_or_nan():
    labels = np.where(np.arange(TOKENS) == 3, CLASSES, LABELS)
    with pytest.raises(ValueError, match=r"label 23 at position \(3,\)"):
        linear_token_statistics(HIDDEN, KERNEL, labels)
    # Inside XLA nothing can be raised.
    function = MODES[TWO_MODES[1]](lambda hidden: linear_token_statistics(hidden, KERNEL, labels)[:3])
    for column in function(tensor(HIDDEN)):
        assert np.isnan(to_numpy(column)[3]) and np.isfinite(np.delete(to_numpy(column), 3)).all()
    ignored = linear_token_statistics(HIDDEN, KERNEL, labels, ignore_class=CLASSES)
    assert to_numpy(ignored.log_prob)[3] == 0


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="`temperature` must be a number above 0. Received: temperature=0."):
        linear_token_statistics(HIDDEN, KERNEL, LABELS, temperature=0)
    with pytest.raises(ValueError, match="`labels` must have the shape of `hidden`"):
        linear_token_statistics(HIDDEN, KERNEL, LABELS[1:])


@whole
def test_the_log_probability_is_minus_the_cross_entropy():
    log_prob = linear_token_statistics(HIDDEN, KERNEL, LABELS, BIAS).log_prob
    loss = kx.kernels.linear_cross_entropy(HIDDEN, KERNEL, LABELS, BIAS)
    np.testing.assert_array_equal(to_numpy(log_prob), -to_numpy(loss))


def test_ranks_of_ties_and_no_tokens():
    kernel = np.ones((5, 11), "float32")
    found = kx.kernels.linear_token_statistics(np.zeros((3, 5), "float32"), kernel, np.array([0, 4, 10]))
    np.testing.assert_array_equal(to_numpy(found.rank), [0, 4, 10])
    nothing = kx.kernels.linear_token_statistics(np.zeros((0, 5), "float32"), kernel, np.zeros(0, "int32"))
    assert all(to_numpy(column).shape == (0,) for column in nothing)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_logits_that_are_all_minus_infinity_have_no_distribution(temperature):
    bias = np.full(KERNEL.shape[1], -np.inf, "float32")
    found = linear_token_statistics(HIDDEN, KERNEL, LABELS, bias, temperature=temperature)
    assert all(np.isnan(to_numpy(x)).all() for x in (found.log_prob, found.entropy, found.logsumexp))
