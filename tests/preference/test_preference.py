"""Losses of log-probabilities: closed-form values, and a float64 oracle for values and gradients."""

import math
import warnings

import numpy as np
import pytest

import keras_xent as kx
from tests.backend import MODES, TWO_MODES, tensor, to_numpy, value_and_gradient
from tests.tiers import whole

RNG = np.random.default_rng(0)
POLICY, OTHER, REFERENCE, REFERENCE_OTHER = -RNG.uniform(0.1, 6, (4, 9)).astype("float32").astype("float64")
DESIRABLE = RNG.random(9) < 0.5


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def margin(c, r):
    return (c - r) - (REFERENCE - REFERENCE_OTHER)


def odds(x):
    return np.log(np.exp(x) / (1 - np.exp(x)))


def kto_oracle(c, r):
    z = max(0.0, 0.3)
    h = c - REFERENCE
    return np.where(DESIRABLE, 1.5 * (1 - sigmoid(0.4 * (h - z))), 0.7 * (1 - sigmoid(0.4 * (z - h))))


CASES = {
    "dpo": (
        lambda c, r: kx.preference.dpo(c, r, f32(REFERENCE), f32(REFERENCE_OTHER), beta=0.3),
        lambda c, r: -np.log(sigmoid(0.3 * margin(c, r))),
    ),
    "dpo, smoothed": (
        lambda c, r: kx.preference.dpo(c, r, f32(REFERENCE), f32(REFERENCE_OTHER), beta=0.3, label_smoothing=0.2),
        lambda c, r: -0.8 * np.log(sigmoid(0.3 * margin(c, r))) - 0.2 * np.log(sigmoid(-0.3 * margin(c, r))),
    ),
    "ipo": (
        lambda c, r: kx.preference.ipo(c, r, f32(REFERENCE), f32(REFERENCE_OTHER), beta=0.3),
        lambda c, r: (margin(c, r) - 1 / 0.6) ** 2,
    ),
    "simpo": (
        lambda c, r: kx.preference.simpo(c, r, beta=2.0, gamma=0.7),
        lambda c, r: -np.log(sigmoid(2 * (c - r) - 0.7)),
    ),
    "orpo": (
        lambda c, r: kx.preference.orpo(c, r, beta=0.4),
        lambda c, r: -c - 0.4 * np.log(sigmoid(odds(c) - odds(r))),
    ),
    "kto": (
        lambda c, r: kx.preference.kto(
            c, f32(REFERENCE), DESIRABLE, kl=0.3, beta=0.4, desirable_weight=1.5, undesirable_weight=0.7
        ),
        kto_oracle,
    ),
}


def f32(x):
    return np.asarray(x, "float32")


@pytest.mark.parametrize("mode", TWO_MODES)
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_the_oracle(case, mode):
    function, oracle = CASES[case]
    for which, argument in enumerate((POLICY, OTHER)):
        if case == "kto" and which:
            continue
        fixed = [f32(POLICY), f32(OTHER)]

        def of_one(x, which=which, fixed=fixed):
            return function(*(x if i == which else tensor(f) for i, f in enumerate(fixed)))

        value, gradient = value_and_gradient(of_one, tensor(f32(argument)), mode=mode)
        np.testing.assert_allclose(value, oracle(POLICY, OTHER), rtol=3e-6, atol=1e-7)
        step = 1e-6
        moved = [oracle(*(a + s * step if i == which else a for i, a in enumerate((POLICY, OTHER)))) for s in (1, -1)]
        expected = (moved[0] - moved[1]) / (2 * step)
        np.testing.assert_allclose(gradient, expected, atol=1e-6 * np.abs(expected).max() + 1e-8, rtol=2e-6)


def test_losses_are_one_half_of_a_coin_where_the_policy_is_the_reference():
    x, y = f32(POLICY), f32(OTHER)
    np.testing.assert_allclose(to_numpy(kx.preference.dpo(x, y, x, y)), math.log(2), rtol=1e-6)
    np.testing.assert_allclose(to_numpy(kx.preference.ipo(x, y, x, y, beta=0.5)), 1.0, rtol=1e-6)
    np.testing.assert_allclose(to_numpy(kx.preference.kto(x, x, DESIRABLE)), 0.5, rtol=1e-6)
    np.testing.assert_allclose(to_numpy(kx.preference.simpo(x, x, gamma=0.0)), math.log(2), rtol=1e-6)


def test_extreme_log_probabilities_stay_finite():
    far = f32([-1e30, -1e4, -1e-30, 0.0])
    for loss in (
        kx.preference.dpo(far, far[::-1], far, far),
        kx.preference.orpo(far, far[::-1]),
        kx.preference.simpo(far, far[::-1]),
    ):
        assert np.isfinite(to_numpy(loss)).all()


@pytest.mark.parametrize("below", [5.0, 20.0, 40.0, 60.0])
def test_the_odds_of_a_completion_that_is_sure_have_the_gradient_of_its_logit(below):
    """Of one token, the log-odds are its logit less the log-sum-exp of the others: a slope of 1, however sure."""

    def loss(x):
        rejected = kx.kernels.linear_token_statistics(x, np.eye(2, dtype="float32"), [0]).log_prob
        return kx.preference.orpo(f32([-1.0]), rejected, beta=0.5)

    value, gradient = value_and_gradient(loss, tensor(f32([[below, 0.0]])))
    ratio = odds(-1.0) - below
    np.testing.assert_allclose(value, 1.0 + 0.5 * np.log1p(np.exp(-ratio)), rtol=1e-6)
    np.testing.assert_allclose(gradient, 0.5 * sigmoid(-ratio) * np.array([[1.0, -1.0]]), rtol=2e-6)


FAR = f32([-1e4, 1e4, -1e4, 1e4])


@pytest.mark.parametrize(
    "loss",
    [
        lambda x, o: kx.preference.dpo(x, o, o, o, label_smoothing=0.1),
        lambda x, o: kx.preference.ipo(x, o, o, o),
        lambda x, o: kx.preference.simpo(x, o),
        lambda x, o: kx.preference.orpo(x, o - 1.0),
        lambda x, o: kx.preference.kto(x, o, np.array([True, True, False, False])),
        lambda x, o: kx.preference.grpo(x, o, f32([1, 1, -1, -1]), reference_logps=o, beta=0.1),
    ],
)
def test_gradients_at_log_ratios_of_ten_thousand_are_finite(loss):
    value, gradient = value_and_gradient(lambda x: loss(x, np.zeros(4, "float32")), tensor(FAR))
    assert np.isfinite(value).all() and np.isfinite(gradient).all()


@pytest.mark.parametrize("desirable", [True, False])
def test_kto_has_a_gradient_however_far_the_policy_is_from_the_reference(desirable):
    x = np.array([-60.0, -20.0, -9.0, 0.0, 9.0, 20.0, 60.0])
    zeros, kind = np.zeros(len(x), "float32"), np.full(len(x), desirable)
    _, gradient = value_and_gradient(lambda x: kx.preference.kto(x, zeros, kind, beta=1.0), tensor(f32(x)))
    slope = sigmoid(x) * sigmoid(-x)
    np.testing.assert_allclose(gradient, -slope if desirable else slope, rtol=2e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_references_in_float64_are_those_of_the_policys_dtype(dtype):
    def loss(kind):
        c, r = (tensor(x, dtype) for x in (f32([-2.0, -4.0]), f32([-3.0, -1.5])))
        return kx.preference.dpo(c, r, np.array([-2.5, -3.0], kind), np.array([-2.0, -2.0], kind))

    np.testing.assert_array_equal(to_numpy(loss("float64")), to_numpy(loss("float32")))
    assert "float32" in str(loss("float64").dtype)


# grpo

T = 4
NEW, OLD, REF = -RNG.uniform(0.1, 2, (3, 5, T)).astype("float32").astype("float64")
OLD = NEW + 0.4 * (RNG.random((5, T)) - 0.5)
ADVANTAGES = RNG.standard_normal(5).astype("float32").astype("float64")
MASK = np.arange(T) < np.array([4, 2, 1, 3, 0])[:, None]


def grpo_tokens(new, epsilon_high=0.15, beta=0.05):
    ratio, a, d = np.exp(new - f32(OLD)), ADVANTAGES[:, None], f32(REF) - new
    clipped = np.clip(ratio, 1 - 0.1, 1 + epsilon_high)
    return -np.minimum(ratio * a, clipped * a) + beta * (np.exp(d) - d - 1)


def reduced(losses, reduction):
    losses = np.where(MASK, losses, 0)
    if reduction == "sequence_mean":
        return (losses.sum(1)[:4] / MASK.sum(1)[:4]).mean()
    return losses.sum() / MASK.sum() if reduction == "token_mean" else losses


@pytest.mark.parametrize("reduction", ["sequence_mean", "token_mean", "none"])
def test_grpo_is_that_of_the_oracle_and_ignores_what_is_masked(reduction):
    spoiled = np.where(MASK, NEW, np.nan)

    def function(x):
        return kx.preference.grpo(
            x,
            f32(np.where(MASK, OLD, np.inf)),
            f32(ADVANTAGES),
            mask=MASK,
            epsilon=0.1,
            epsilon_high=0.15,
            reference_logps=f32(REF),
            beta=0.05,
            reduction=reduction,
        )

    value, gradient = value_and_gradient(function, tensor(f32(spoiled)))
    np.testing.assert_allclose(value, reduced(grpo_tokens(NEW), reduction), rtol=2e-6, atol=1e-6)
    expected = np.zeros_like(NEW)
    for i in np.argwhere(MASK):
        step = np.zeros_like(NEW)
        step[tuple(i)] = 1e-6
        moved = [np.sum(reduced(grpo_tokens(NEW + s * step), reduction)) for s in (1, -1)]
        expected[tuple(i)] = (moved[0] - moved[1]) / 2e-6
    np.testing.assert_allclose(gradient, expected, atol=1e-6)
    assert (gradient[~MASK] == 0).all()


def test_grpo_of_means_over_tokens_clips_ratios_of_completions_as_gspo():
    means = [np.where(MASK, x, 0).sum(1)[:4] / MASK.sum(1)[:4] for x in (NEW, OLD)]
    value = to_numpy(kx.preference.grpo(*map(f32, means), f32(ADVANTAGES[:4]), epsilon=0.01))
    ratio = np.exp(means[0] - means[1])
    gains = np.minimum(ratio * ADVANTAGES[:4], np.clip(ratio, 0.99, 1.01) * ADVANTAGES[:4])
    np.testing.assert_allclose(value, -gains.mean(), rtol=2e-6)


def test_on_policy_the_gradient_of_grpo_is_that_of_reinforce():
    _, gradient = value_and_gradient(
        lambda x: kx.preference.grpo(x, f32(NEW), f32(ADVANTAGES), reduction="sum"), tensor(f32(NEW))
    )
    np.testing.assert_allclose(gradient, np.tile(-ADVANTAGES[:, None], (1, T)), rtol=1e-6)


@whole
def test_negative_token_weights_are_the_policy_gradient_of_reinforce():
    hidden, kernel = f32(RNG.standard_normal((6, 3))), f32(RNG.standard_normal((3, 5)))
    labels, advantages = RNG.integers(0, 5, 6), f32(RNG.standard_normal(6))

    def loss(kernel):
        return kx.kernels.linear_cross_entropy(
            hidden, kernel, labels, token_weights=advantages, reduction="sum", gradients=("kernel",)
        )

    _, gradient = value_and_gradient(loss, tensor(kernel))
    x = hidden.astype("float64") @ kernel
    p = np.exp(x - np.log(np.exp(x).sum(1, keepdims=True)))
    expected = hidden.astype("float64").T @ ((p - np.eye(5)[labels]) * advantages[:, None])
    np.testing.assert_allclose(gradient, expected, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("epsilon", [0.0, 0.2])
def test_on_policy_the_clip_range_does_not_matter(epsilon):
    """The two sides of the minimum are equal there: each backend has another gradient of a minimum."""
    for sign in (1.0, -1.0):
        _, gradient = value_and_gradient(
            lambda x, sign=sign: kx.preference.grpo(
                x, f32(NEW), f32(np.full(5, sign)), epsilon=epsilon, reduction="sum"
            ),
            tensor(f32(NEW)),
        )
        np.testing.assert_array_equal(gradient, np.full((5, T), -sign, "float32"))


def test_kto_takes_labels_of_minus_one():
    x, reference = f32(POLICY), f32(REFERENCE)
    expected = to_numpy(kx.preference.kto(x, reference, DESIRABLE))
    np.testing.assert_array_equal(to_numpy(kx.preference.kto(x, reference, np.where(DESIRABLE, 1, -1))), expected)
    np.testing.assert_array_equal(to_numpy(kx.preference.kto(x, reference, DESIRABLE.astype("int32"))), expected)


# Arguments


@pytest.mark.parametrize(
    "call, sentence",
    [
        (lambda: kx.preference.dpo([1.0], [1.0, 2.0], [1.0], [1.0]), r"`policy_rejected_logps` must have the shape"),
        (lambda: kx.preference.dpo([1.0], [1.0], [1.0], [1.0], beta=0), r"`beta` must be a number above 0"),
        (lambda: kx.preference.kto([1.0], [1.0], [True, False]), r"`is_desirable` must have the shape"),
        (lambda: kx.preference.grpo([[1.0]], [[1.0]], [1.0], beta=0.1), r"`reference_logps` must be given"),
        (lambda: kx.preference.grpo([[1.0]], [[1.0]], [1.0], reduction="avg"), r"`reduction` must be one of"),
        (
            lambda: kx.preference.grpo([[1.0]], [[1.0]], [1.0], beta=0.1, reference_logps=[1.0]),
            r"`reference_logps` must have the shape",
        ),
        (lambda: kx.preference.dpo([1.0], [1.0], None, None), r"`reference_chosen_logps` must be .* Received: None"),
        (
            lambda: kx.preference.dpo(*[[[1.0, 2.0]]] * 4),
            r"`policy_chosen_logps` must hold one log-prob.*shape \(1, 2\)",
        ),
        (lambda: kx.preference.kto([[1.0, 2.0]], [[1.0, 2.0]], [[1, 0]]), r"`policy_logps` must hold one log-prob"),
        (lambda: kx.preference.kto([1.0], [1.0], None), r"`is_desirable` must be .* Received: None"),
        (lambda: kx.preference.grpo([[1.0]], [[1.0]], None), r"`advantages` must be .* Received: None"),
        (lambda: kx.preference.ipo([1.0], [1.0], [1.0], [1.0], beta=-1), r"`beta` must be a number above 0"),
        (lambda: kx.preference.orpo([1.0], [1.0], beta=-1), r"`beta` must be a number of at least 0"),
        (lambda: kx.preference.orpo([1.0], [1.0], beta=math.inf), r"`beta` must be a number of at least 0.*beta=inf"),
    ],
)
def test_wrong_arguments_are_named(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


def test_a_reference_without_beta_gets_a_warning_at_the_line_of_the_user():
    arguments = [[-1.0]], [[-1.0 - math.log(1.1)]], [1.0]
    with pytest.warns(UserWarning, match=r"`reference_logps` have no effect without `beta`.*beta=0\.0") as caught:
        loss = kx.preference.grpo(*arguments, reference_logps=[[-3.0]])
    assert caught[0].filename == __file__
    np.testing.assert_allclose(float(loss), -1.1, rtol=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_allclose(float(kx.preference.grpo(*arguments)), -1.1, rtol=1e-6)
        loss = kx.preference.grpo(*arguments, reference_logps=[[-3.0]], beta=0.0)
    np.testing.assert_allclose(float(loss), -1.1, rtol=1e-6)


def test_kto_without_other_prompts_has_the_reference_point_0():
    x, reference = f32(POLICY), f32(REFERENCE)
    expected = to_numpy(kx.preference.kto(x, reference, DESIRABLE))
    np.testing.assert_array_equal(to_numpy(kx.preference.kto(x, reference, DESIRABLE, kl=[])), expected)


def test_an_infinite_clip_range_is_that_of_no_clipping():
    ratio = np.exp(np.array([[3.0, -3.0]]))
    for advantage in (1.0, -1.0):
        loss = kx.preference.grpo(
            [[0.0, -6.0]], [[-3.0, -3.0]], [advantage], epsilon=math.inf, epsilon_high=math.inf, reduction="sum"
        )
        np.testing.assert_allclose(float(loss), -(ratio * advantage).sum(), rtol=1e-6)


def test_it_runs_inside_a_compiled_step():
    function = MODES[TWO_MODES[1]](lambda x: kx.preference.dpo(x, f32(OTHER), f32(REFERENCE), f32(REFERENCE_OTHER)))
    assert to_numpy(function(tensor(f32(POLICY)))).shape == (9,)
