"""Distillation kernels: a float64 oracle for values and the gradient of each input, masks, and the K best classes."""

import numpy as np
import pytest
from keras import ops

from keras_xent.kernels import linear_distillation, linear_top_k_distillation
from tests.backend import MODES, TWO_MODES, skip_on_accelerator, tensor, to_numpy, with_gradients
from tests.internals import set_sizes
from tests.tiers import fast_for, whole

TOKENS, FEATURES, WIDTH, CLASSES, K = 29, 6, 4, 23, 5
RNG = np.random.default_rng(5)
HIDDEN, KERNEL, BIAS, TEACHER, TEACHER_KERNEL, TEACHER_BIAS = (
    RNG.standard_normal(shape).astype("float32")
    for shape in ((TOKENS, FEATURES), (FEATURES, CLASSES), (CLASSES,), (TOKENS, WIDTH), (WIDTH, CLASSES), (CLASSES,))
)
MASK = RNG.random(TOKENS) < 0.6
WEIGHTS = RNG.uniform(0.3, 2, TOKENS).astype("float32")
IDS = np.stack([RNG.permutation(CLASSES)[:K] for _ in range(TOKENS)])
IDS[3, 2] = -1
LOG_P = np.log(RNG.dirichlet(np.ones(K), TOKENS) * 0.9).astype("float32")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks of 8 tokens made of large blocks of 4: nothing divides anything."""
    set_sizes(monkeypatch.setattr, fewest_rows=1, chunk_bytes=4 * CLASSES * 16, block_bytes=4 * CLASSES)


def softmax(x):
    e = np.exp(x - x.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def capped(x, cap):
    return x if cap is None else cap * np.tanh(x / cap)


def jacobian_product(q, slope):
    """The gradient for logits of a function of probabilities, by the Jacobian of the softmax."""
    return q * (slope - (q * slope).sum(1, keepdims=True))


def oracle(hidden, kernel, bias, upstream, *, cap=None, **options):
    hidden, kernel, bias = (np.asarray(a, "float64") for a in (hidden, kernel, bias))
    raw = hidden @ kernel + bias
    teacher = TEACHER.astype("float64") @ TEACHER_KERNEL + TEACHER_BIAS
    loss, d = oracle_of_logits(capped(raw, cap), teacher, **options)
    d = d * np.asarray(upstream, "float64")[:, None] * (1 if cap is None else 1 - np.tanh(raw / cap) ** 2)
    return loss, [d @ kernel.T, hidden.T @ d, d.sum(0)]


def oracle_of_logits(logits, teacher, *, divergence="forward_kl", temperature=1.0, beta=0.5):
    """Losses, and their gradient for the logits."""
    p, q = (softmax(np.asarray(x, "float64") / temperature) for x in (teacher, logits))
    if divergence == "forward_kl":
        loss, slope = (p * np.log(p / q)).sum(1), -p / q
    elif divergence == "reverse_kl":
        loss, slope = (q * np.log(q / p)).sum(1), np.log(q / p) + 1
    else:
        m = beta * p + (1 - beta) * q
        loss = beta * (p * np.log(p / m)).sum(1) + (1 - beta) * (q * np.log(q / m)).sum(1)
        slope = -beta * (1 - beta) * p / m + (1 - beta) * (np.log(q / m) + 1 - (1 - beta) * q / m)
    return temperature**2 * loss, temperature * jacobian_product(q, slope)


def run(function, inputs, upstream=None, mode="eager"):
    """`function(*inputs)`, and the gradients of its product with `upstream`."""
    inputs = tuple(map(tensor, inputs))

    def total(*inputs):
        value = function(*inputs)
        return (value if upstream is None else ops.sum(value * ops.cast(upstream, value.dtype))), value

    (_, value), gradients = MODES[mode](with_gradients(total))(*inputs)
    return to_numpy(value), [to_numpy(g) for g in gradients]


def distilled(**options):
    return lambda hidden, kernel, bias: linear_distillation(
        hidden, kernel, TEACHER, TEACHER_KERNEL, bias, TEACHER_BIAS, **options
    )


def assert_close(mine, expected):
    for one, other in zip(mine, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-6 * np.abs(other).max())


CASES = {
    "forward": {},
    "forward, hot": {"temperature": 2.5},
    "reverse": {"divergence": "reverse_kl", "temperature": 1.5},
    "Jensen-Shannon": {"divergence": "jensen_shannon", "beta": 0.3, "temperature": 2.0},
    "capped": {"cap": 1.5, "temperature": 0.5},
}


@fast_for("Jensen-Shannon-xla", "Jensen-Shannon-jit")
@pytest.mark.parametrize("mode", TWO_MODES)
@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_are_those_of_the_oracle(case, mode):
    upstream = RNG.standard_normal(TOKENS).astype("float32")
    value, gradients = oracle(HIDDEN, KERNEL, BIAS, upstream, **CASES[case])
    options = {"logit_softcap" if name == "cap" else name: option for name, option in CASES[case].items()}
    mine, my_gradients = run(distilled(**options), (HIDDEN, KERNEL, BIAS), upstream, mode)
    assert_close([mine, *my_gradients], [value, *gradients])


def test_the_gradient_of_a_mean_is_formed_in_the_forward_pass_to_the_same():
    weights = np.where(MASK, WEIGHTS, 0)
    losses, gradients = oracle(HIDDEN, KERNEL, BIAS, weights / weights.sum(), temperature=2.0)
    spoiled, teacher = (np.where(MASK[:, None], x, np.nan) for x in (HIDDEN, TEACHER))

    def function(hidden, kernel, bias):
        options = {"temperature": 2.0, "mask": MASK, "token_weights": WEIGHTS, "reduction": "token_mean"}
        return linear_distillation(hidden, kernel, teacher, TEACHER_KERNEL, bias, TEACHER_BIAS, **options)

    mine, my_gradients = run(function, (spoiled, KERNEL, BIAS))
    np.testing.assert_allclose(mine, (losses * weights).sum() / weights.sum(), rtol=2e-6)
    assert_close(my_gradients, [np.where(MASK[:, None], gradients[0], 0), *gradients[1:]])


@fast_for("float64-float32")
@pytest.mark.parametrize("dtype, of_teacher", [("float64", "float32"), ("float32", "float64"), ("float16", "float64")])
def test_heads_may_differ_in_dtype(dtype, of_teacher):
    teacher, teacher_kernel, teacher_bias = (a.astype(of_teacher) for a in (TEACHER, TEACHER_KERNEL, TEACHER_BIAS))

    def function(*student):
        return linear_distillation(*student[:2], teacher, teacher_kernel, student[2], teacher_bias)

    student = [a.astype(dtype) for a in (HIDDEN, KERNEL, BIAS)]
    upstream = np.ones(TOKENS)
    value, gradients = oracle(*student, upstream)
    mine, my_gradients = run(function, student, upstream)
    rounding = 1e-3 if dtype == "float16" else 2e-6
    for one, other in zip([mine, *my_gradients], [value, *gradients], strict=True):
        np.testing.assert_allclose(one, other, atol=rounding * np.abs(other).max())


@pytest.mark.whole
def test_tied_kernels_are_the_transposed_ones():
    mine = linear_distillation(
        HIDDEN, KERNEL.T.copy(), TEACHER, TEACHER_KERNEL.T.copy(), transpose_kernel=True, transpose_teacher_kernel=True
    )
    plain = linear_distillation(HIDDEN, KERNEL, TEACHER, TEACHER_KERNEL)
    np.testing.assert_allclose(to_numpy(mine), to_numpy(plain), atol=2e-6)


@whole
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jensen_shannon"])
def test_a_student_that_is_its_teacher_has_loss_and_gradient_0(divergence):
    skip_on_accelerator("the two products may be rounded in different ways there")

    def function(hidden, kernel, bias):
        return linear_distillation(hidden, kernel, HIDDEN, KERNEL, bias, BIAS, divergence=divergence)

    for one in run(function, (HIDDEN, KERNEL, BIAS), np.ones(TOKENS, "float32")):
        assert all((part == 0).all() for part in one)


@fast_for("jensen_shannon")
@pytest.mark.parametrize("divergence", ["reverse_kl", "jensen_shannon"])
def test_a_cold_student_that_is_sure_keeps_its_small_gradients(divergence):
    """Of each of these rows the gradient is a small difference of terms near a mean that is not small."""
    logits = np.array([[9.0, 0, -1], [0, 9, 2], [8, 1, 0]], "float32")
    teacher = np.array([[0.0, 12, 3], [0, 1, 12], [1, 2, 13]], "float32")
    identity = np.eye(3, dtype="float32")

    def function(hidden, kernel, bias):
        return linear_distillation(hidden, kernel, teacher, identity, bias, divergence=divergence, beta=0.3)

    _, (gradient, *_) = run(function, (logits, identity, np.zeros(3, "float32")), np.ones(3, "float32"))
    p, q = softmax(teacher.astype("float64")), softmax(logits.astype("float64"))
    if divergence == "reverse_kl":
        slope = np.log(q / p)
    else:
        slope = 0.7 * np.log(q / (0.3 * p + 0.7 * q))
    np.testing.assert_allclose(gradient, jacobian_product(q, slope), rtol=2e-6)


def of_logits(logits, teacher, **options):
    """Losses, and their gradient for the logits: heads of identity matrices."""
    identity = np.eye(logits.shape[1], dtype="float32")

    def function(hidden, kernel, bias):
        return linear_distillation(hidden, kernel, teacher, identity, bias, **options)

    inputs = logits, identity, np.zeros(logits.shape[1], "float32")
    value, (gradient, *_) = run(function, inputs, np.ones(len(logits), "float32"))
    return value, gradient


@whole
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jensen_shannon"])
def test_cold_distributions_of_many_classes_are_those_of_the_oracle(divergence):
    logits, teacher = RNG.normal(scale=0.3, size=(2, 16, 2000)).astype("float32")
    options = {"divergence": divergence, "temperature": 0.05}
    assert_close(of_logits(logits, teacher, **options), oracle_of_logits(logits, teacher, **options))


@fast_for("close-forward_kl", "hot-forward_kl")
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("case", ["close", "hot", "flat", "sure"])
def test_divergences_of_nearly_equal_distributions_keep_their_digits(case, divergence):
    """Of about 1e-7 in each row but for `T^2`, below the rounding of a sum of `p (log p - log q)`."""
    noise, other = RNG.standard_normal((2, 16, 2000)).astype("float32")
    is_best = np.arange(2000) == 7
    logits, teacher, temperature = {
        "close": (3 * noise, 3 * noise + np.float32(0.01) * other, 1.0),
        "hot": (3 * noise, 3 * other, 1e4),
        "flat": (np.float32(1e-3) * noise, np.float32(1e-3) * other, 1.0),
        "sure": (noise + np.float32(25) * is_best, noise + other / 2 + np.float32(25) * is_best, 1.0),
    }[case]
    logits, teacher = logits.astype("float32"), teacher.astype("float32")
    options = {"divergence": divergence, "temperature": temperature}
    value, _ = of_logits(logits, teacher, **options)
    np.testing.assert_allclose(value, oracle_of_logits(logits, teacher, **options)[0], rtol=2e-6)


@pytest.mark.whole
def test_classes_that_are_switched_off_in_both_heads_leave_no_trace():
    off = np.where(np.arange(CLASSES) < 20, 0, -np.inf).astype("float32")
    for divergence in ("forward_kl", "reverse_kl", "jensen_shannon"):
        few = linear_distillation(
            HIDDEN, KERNEL[:, :20], TEACHER, TEACHER_KERNEL[:, :20], divergence=divergence, reduction="sum"
        )

        def function(hidden, kernel, bias, divergence=divergence):
            return linear_distillation(
                hidden, kernel, TEACHER, TEACHER_KERNEL, bias, off, divergence=divergence, reduction="sum"
            )

        value, gradients = run(function, (HIDDEN, KERNEL, off))
        np.testing.assert_allclose(value, to_numpy(few), rtol=1e-6)
        assert all(np.isfinite(g).all() for g in gradients)


# The K best classes


def top_k_oracle(hidden, kernel, bias, upstream, temperature):
    hidden, kernel, bias = (np.asarray(a, "float64") for a in (hidden, kernel, bias))
    q = softmax((hidden @ kernel + bias) / temperature)
    p = np.zeros((TOKENS, CLASSES))
    for n in range(TOKENS):
        for i, log_p in zip(IDS[n], LOG_P[n].astype("float64"), strict=True):
            if i >= 0:
                p[n, i] += np.exp(log_p)
    terms = np.where(p > 0, p * (np.log(np.where(p > 0, p, 1)) - np.log(q)), 0)
    d = temperature * (q * p.sum(1, keepdims=True) - p) * np.asarray(upstream, "float64")[:, None]
    return temperature**2 * terms.sum(1), [d @ kernel.T, hidden.T @ d, d.sum(0)]


@fast_for("eager")
@pytest.mark.parametrize("mode", TWO_MODES)
def test_top_k_losses_and_gradients_are_those_of_the_oracle(mode):
    upstream = RNG.standard_normal(TOKENS).astype("float32")

    def function(hidden, kernel, bias):
        return linear_top_k_distillation(hidden, kernel, IDS, LOG_P, bias, temperature=1.5)

    mine, my_gradients = run(function, (HIDDEN, KERNEL, BIAS), upstream, mode)
    value, gradients = top_k_oracle(HIDDEN, KERNEL, BIAS, upstream, 1.5)
    assert_close([mine, *my_gradients], [value, *gradients])


@pytest.mark.whole
def test_draws_of_a_teacher_have_the_gradient_of_their_shares():
    """As K draws of each token have in expectation the gradient of the whole teacher."""
    draws = RNG.integers(0, 3, (TOKENS, 8))
    shares = np.stack([(draws == c).mean(1) for c in range(3)], axis=1)

    def gradients_of(ids, p):
        def function(hidden, kernel, bias):
            return linear_top_k_distillation(hidden, kernel, ids, np.log(p), bias)

        with np.errstate(divide="ignore"):
            return run(function, (HIDDEN, KERNEL, BIAS), np.ones(TOKENS, "float32"))[1]

    of_draws = gradients_of(draws, np.full(draws.shape, 1 / 8))
    assert_close(of_draws, gradients_of(np.tile(np.arange(3), (TOKENS, 1)), shares))


@pytest.mark.parametrize("log_p", [-86.0, -87.0, -100.0])
def test_a_teacher_that_gives_its_classes_next_to_nothing_leaves_no_nan(log_p):
    """The sum of the student's exponentials, divided by that of the teacher's probabilities, has no float32 number."""

    def function(hidden, kernel, bias):
        return linear_top_k_distillation(hidden, kernel, IDS[:, :1], np.full((TOKENS, 1), log_p), bias)

    value, gradients = run(function, (0 * HIDDEN, KERNEL, 0 * BIAS), np.ones(TOKENS, "float32"))
    assert np.abs(value).max() < 1e-30 and all(np.abs(g).max() < 1e-30 for g in gradients)


@pytest.mark.whole
def test_all_classes_are_the_whole_teacher():
    p = softmax(TEACHER.astype("float64") @ TEACHER_KERNEL / 2)
    ids = np.tile(np.arange(CLASSES), (TOKENS, 1))
    mine = linear_top_k_distillation(HIDDEN, KERNEL, ids, np.log(p), temperature=2.0, mask=MASK, reduction="token_mean")
    whole = linear_distillation(
        HIDDEN, KERNEL, TEACHER, TEACHER_KERNEL, temperature=2.0, mask=MASK, reduction="token_mean"
    )
    np.testing.assert_allclose(float(mine), float(whole), rtol=1e-6)


def test_the_last_class_that_an_unsigned_type_holds_is_not_padding():
    ids = tensor(np.array([[255], [3]], "uint8"))
    loss = linear_top_k_distillation(HIDDEN[:2], np.zeros((HIDDEN.shape[1], 256), "float32"), ids, np.zeros((2, 1)))
    np.testing.assert_allclose(to_numpy(loss), np.log(256), rtol=1e-6)


def test_a_class_that_only_the_teacher_has_is_an_error_or_nan():
    ids = np.where(np.arange(TOKENS)[:, None] == 4, CLASSES, IDS)
    with pytest.raises(
        ValueError, match=r"`ids` must be classes from 0 to 22, .* label 23 at position \(4, 0\).* with -1"
    ):
        linear_top_k_distillation(HIDDEN, KERNEL, ids, LOG_P)

    def function(hidden, kernel, bias, **options):
        return linear_top_k_distillation(hidden, kernel, tensor(ids), LOG_P, bias, **options)

    # Inside XLA nothing can be raised.
    value, (d_hidden, *_) = run(function, (HIDDEN, KERNEL, BIAS), np.ones(TOKENS, "float32"), TWO_MODES[1])
    for one in (value, d_hidden):
        assert np.isnan(one[4]).all() and np.isfinite(np.delete(one, 4, axis=0)).all()
    # What does not count may be anything.
    expected = to_numpy(linear_top_k_distillation(HIDDEN, KERNEL, IDS, LOG_P, BIAS))
    for options in ({"mask": np.arange(TOKENS) != 4}, {"token_weights": (np.arange(TOKENS) != 4).astype("float32")}):
        found = to_numpy(function(HIDDEN, KERNEL, BIAS, **options))
        np.testing.assert_allclose(found, np.where(np.arange(TOKENS) == 4, 0, expected), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_a_student_without_a_limit_has_the_loss_nan(reduction):
    bias = np.where(np.arange(CLASSES) < 2, np.inf, 0).astype("float32")
    options = {"reduction": reduction, "training": False}
    assert np.isnan(to_numpy(linear_top_k_distillation(HIDDEN, KERNEL, IDS, LOG_P, bias, **options))).all()


@pytest.mark.parametrize(
    "call, sentence",
    [
        (lambda: linear_distillation(HIDDEN, KERNEL, TEACHER[1:], TEACHER_KERNEL), "`teacher_hidden` must have the"),
        (lambda: linear_distillation(HIDDEN, KERNEL, TEACHER, KERNEL), "`teacher_hidden` must have shape"),
        (lambda: linear_distillation(HIDDEN, KERNEL, HIDDEN, KERNEL[:, 1:]), "`teacher_kernel` must have the classes"),
        (lambda: linear_distillation(HIDDEN, KERNEL, HIDDEN, KERNEL, divergence="kl"), "`divergence` must be one of"),
        (
            lambda: linear_distillation(HIDDEN, KERNEL, HIDDEN, KERNEL, beta=1.0),
            "`beta` must be a number between.*reverse_kl",
        ),
        (lambda: linear_top_k_distillation(HIDDEN, KERNEL, IDS, LOG_P[:, 1:]), "`log_probs` must have the shape"),
        (
            lambda: linear_top_k_distillation(HIDDEN, KERNEL, LOG_P, IDS),
            "`ids` must be integers.* Received: dtype float",
        ),
        (lambda: linear_top_k_distillation(HIDDEN, KERNEL, IDS, None), "`log_probs` must be .* Received: None"),
    ],
)
def test_wrong_arguments_are_named(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


def test_probabilities_in_the_place_of_logarithms_are_an_error_in_eager_mode():
    skip_on_accelerator("a check would make the device wait")
    with pytest.raises(ValueError, match="`log_probs` must be logarithms"):
        linear_top_k_distillation(HIDDEN, KERNEL, IDS, np.exp(LOG_P))
