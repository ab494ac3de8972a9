"""Losses of groups of sequences: closed-form values, a float64 oracle, and the same by way of token statistics."""

import contextlib
import functools

import numpy as np
import pytest
from keras import ops

import keras_xent as kx
from keras_xent.kernels import linear_sequence_loss
from tests.backend import MODES, TWO_MODES, tensor, to_numpy, value_and_gradient, with_gradients
from tests.internals import without_xla
from tests.tiers import fast_for

GROUPS, LENGTH, FEATURES, CLASSES = 7, 5, 6, 23
RNG = np.random.default_rng(11)
KERNEL = RNG.standard_normal((FEATURES, CLASSES)).astype("float32")
BIAS = RNG.standard_normal(CLASSES).astype("float32")
REFERENCES = tuple(RNG.standard_normal((2, GROUPS)).astype("float32"))


def listwise(first, second, third):
    """The Plackett-Luce loss of a ranking of three."""
    of_all = ops.logsumexp(ops.stack([first, second, third]), axis=0)
    return of_all - first + ops.logaddexp(second, third) - second


# Sequences of a group, the loss, its arrays, and options.
dpo, normalized = functools.partial(kx.preference.dpo, beta=0.5), {"normalize": True}
CASES = {
    "dpo": (2, dpo, REFERENCES, {}),
    "temperature": (2, dpo, REFERENCES, {"temperature": 0.7}),
    "softcap": (2, dpo, REFERENCES, {"logit_softcap": 3.0, "temperature": 1.6}),
    "simpo": (2, kx.preference.simpo, (), normalized),
    "orpo": (2, kx.preference.orpo, (), normalized),
    "groups of 3": (3, listwise, (), normalized),
    "sum": (2, dpo, REFERENCES, {"reduction": "sum"}),
}
# A chunk of one group or two, of some, and of all.
CHUNKS = {"fewest": 2, "some": 3, "all": 10 * GROUPS}


def of_numpy(case, sums):
    """Losses in float64, by their formulas."""
    if case == "groups of 3":
        e = np.exp(sums)
        return -np.log(e[:, 0] / e.sum(1)) - np.log(e[:, 1] / (e[:, 1] + e[:, 2]))
    chosen, rejected = sums.T
    if case == "simpo":
        return np.log1p(np.exp(-(2.0 * (chosen - rejected) - 0.5)))
    if case == "orpo":
        odds = [p / (1 - p) for p in (np.exp(chosen), np.exp(rejected))]
        return -chosen + 0.1 * np.log1p(odds[1] / odds[0])
    first, second = (r.astype("float64") for r in REFERENCES)
    return np.log1p(np.exp(-0.5 * (chosen - rejected - first + second)))


def oracle(case, hidden, labels, mask):
    """Loss, log-probabilities and gradients in float64; the loss is differentiated by central differences."""
    count, _, _, options = CASES[case]
    hidden, kernel, bias = (a.astype("float64") for a in (hidden, KERNEL, BIAS))
    raw, cap, t = hidden @ kernel + bias, options.get("logit_softcap"), options.get("temperature", 1.0)
    x = (raw if cap is None else cap * np.tanh(raw / cap)) / t
    p = np.exp(x - x.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    one_hot = np.eye(CLASSES)[labels]
    keep = np.ones(labels.shape) if mask is None else mask.astype("float64")
    divisor = np.maximum(keep.sum(2), 1.0) if options.get("normalize") else np.ones(keep.shape[:2])
    sums = (np.log((p * one_hot).sum(-1)) * keep).sum(2) / divisor
    weight = 1.0 if options.get("reduction") == "sum" else 1.0 / GROUPS
    step = 1e-5
    moved = [of_numpy(case, sums + sign * step * np.eye(count)[s]) for s in range(count) for sign in (1, -1)]
    slopes = weight * np.stack([(moved[2 * s] - moved[2 * s + 1]) / (2 * step) for s in range(count)], axis=1)
    d = (slopes / divisor)[..., None, None] * keep[..., None] * (one_hot - p) / t
    d = d * (1 if cap is None else 1 - np.tanh(raw / cap) ** 2)
    gradients = [d @ kernel.T, np.einsum("gstd,gstv->dv", hidden, d), d.sum((0, 1, 2))]
    return weight * of_numpy(case, sums).sum(), sums, gradients


def arrays_of(count, *, masked):
    """Hidden states, labels and a mask under which one group has nothing, and one sequence of another."""
    rng = np.random.default_rng(count)
    hidden = rng.standard_normal((GROUPS, count, LENGTH, FEATURES)).astype("float32")
    labels = rng.integers(0, CLASSES, (GROUPS, count, LENGTH))
    mask = rng.random(labels.shape) < 0.6
    mask[2], mask[4, 1] = False, False
    return hidden, labels, mask if masked else None


def run(function, inputs, mode="eager"):
    """The loss and what else it returns, and gradients."""
    (loss, log_probs), gradients = MODES[mode](with_gradients(function))(*map(tensor, inputs))
    return to_numpy(loss), to_numpy(log_probs), [to_numpy(g) for g in gradients]


def ours(case, labels, mask, **more):
    """The loss of a case, as a function of its inputs."""
    _, loss, arrays, options = CASES[case]

    def function(hidden, kernel, bias):
        return linear_sequence_loss(
            hidden, kernel, labels, bias, loss=loss, arrays=arrays, mask=mask, return_log_probs=True, **options, **more
        )

    return function


def bytes_of_chunk(case, chunk):
    return 4 * CLASSES * LENGTH * CASES[case][0] * CHUNKS[chunk]


SWEEP = [*((case, "some") for case in CASES), ("dpo", "fewest"), ("dpo", "all")]


@fast_for("dpo-*-masked-*", "groups of 3-*-all-*", "softcap-*-masked-*")
@pytest.mark.parametrize("mode", TWO_MODES[1:])
@pytest.mark.parametrize("masked", (False, True), ids=("all", "masked"))
@pytest.mark.parametrize(("case", "chunk"), SWEEP)
def test_values_and_gradients_are_those_of_the_oracle(case, chunk, masked, mode):
    hidden, labels, mask = arrays_of(CASES[case][0], masked=masked)
    if masked and case == "orpo":
        # The odds of a sequence without a token are infinite.
        mask[..., 0] = True
    function = ours(case, labels, mask, chunk_bytes=bytes_of_chunk(case, chunk))
    loss, log_probs, gradients = run(function, (hidden, KERNEL, BIAS), mode)
    expected, sums, expected_gradients = oracle(case, hidden, labels, mask)
    np.testing.assert_allclose(loss, expected, rtol=2e-6)
    np.testing.assert_allclose(log_probs, sums, rtol=2e-6, atol=2e-6)
    for one, other in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6 * np.abs(other).max())


def by_tokens(labels, mask):
    def function(hidden, kernel, bias, **options):
        found = kx.kernels.linear_token_statistics(hidden, kernel, labels, bias, mask=mask, **options)
        sums = ops.sum(found.log_prob, axis=2)
        return ops.mean(dpo(sums[:, 0], sums[:, 1], *REFERENCES)), sums

    return function


@pytest.mark.whole
@pytest.mark.parametrize("with_xla", (True, False))
def test_it_is_the_loss_of_token_statistics(with_xla):
    hidden, labels, mask = arrays_of(2, masked=True)
    mine, same = ours("dpo", labels, mask, chunk_bytes=bytes_of_chunk("dpo", "some")), by_tokens(labels, mask)
    with contextlib.nullcontext() if with_xla else without_xla():
        found, expected = (run(f, (hidden, KERNEL, BIAS)) for f in (mine, same))
    for one, other in zip((*found[:2], *found[2]), (*expected[:2], *expected[2]), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_what_is_masked_may_be_anything():
    hidden, labels, mask = arrays_of(2, masked=True)
    spoiled, out_of_range = np.where(mask[..., None], hidden, np.nan), np.where(mask, labels, -100)
    options = {"chunk_bytes": bytes_of_chunk("dpo", "fewest")}
    found = run(ours("dpo", out_of_range, mask, **options), (spoiled, KERNEL, BIAS))
    expected = run(ours("dpo", labels, mask, **options), (hidden, KERNEL, BIAS))
    for one, other in zip((*found[:2], *found[2]), (*expected[:2], *expected[2]), strict=True):
        np.testing.assert_array_equal(one, other)


def test_nothing_active_leaves_the_loss_of_sequences_without_tokens():
    hidden, labels, mask = arrays_of(2, masked=True)
    options = {"chunk_bytes": bytes_of_chunk("dpo", "fewest")}
    loss, log_probs, gradients = run(ours("dpo", labels, mask & False, **options), (hidden, KERNEL, BIAS))
    np.testing.assert_allclose(loss, of_numpy("dpo", np.zeros((GROUPS, 2))).mean(), rtol=2e-6)
    assert not log_probs.any() and not any(g.any() for g in gradients)


def test_factors_of_low_rank_have_a_gradient_of_their_own():
    hidden, labels, mask = arrays_of(2, masked=True)
    down, up = RNG.standard_normal((FEATURES, 2)).astype("float32"), RNG.standard_normal((2, CLASSES)).astype("float32")

    def mine(down, up):
        function = ours("dpo", labels, mask, low_rank=(down, up), chunk_bytes=bytes_of_chunk("dpo", "some"))
        return function(hidden, KERNEL, BIAS)

    def merged(down, up):
        return by_tokens(labels, mask)(hidden, KERNEL + ops.matmul(down, up), BIAS)

    found, expected = (run(f, (down, up)) for f in (mine, merged))
    for one, other in zip((found[0], *found[2]), (expected[0], *expected[2]), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-6, atol=2e-6 * np.abs(other).max())


def test_arrays_of_float64_are_read_as_log_probabilities_are():
    hidden, labels, _ = arrays_of(2, masked=False)

    def of_dtype(dtype, **options):
        arrays = tuple(one.astype(dtype) for one in REFERENCES)
        return linear_sequence_loss(
            hidden, KERNEL, labels, loss=lambda c, r, a, b: ops.square(c - r - a + b), arrays=arrays, **options
        )

    for options in ({}, {"reduction": "none"}):
        np.testing.assert_array_equal(*(to_numpy(of_dtype(one, **options)) for one in ("float64", "float32")))


def test_one_loss_for_each_group():
    hidden, labels, mask = arrays_of(2, masked=True)
    options = {"loss": dpo, "arrays": REFERENCES, "mask": mask}
    losses = linear_sequence_loss(hidden, KERNEL, labels, reduction="none", **options)
    assert losses.shape == (GROUPS,)
    np.testing.assert_allclose(
        to_numpy(ops.mean(losses)), to_numpy(linear_sequence_loss(hidden, KERNEL, labels, **options)), rtol=2e-6
    )


def test_errors_say_what_the_loss_and_the_labels_should_be():
    hidden, labels, _ = arrays_of(2, masked=False)
    with pytest.raises(ValueError, match=r"`loss` must return one number for each group, \[G\]"):
        linear_sequence_loss(hidden, KERNEL, labels, loss=lambda first, second: ops.mean(first - second))
    with pytest.raises(ValueError, match=r"`loss` must return one .* a result of shape \(1,\) of .* shape \(7, 2\)"):
        linear_sequence_loss(hidden, KERNEL, labels, loss=lambda c, r: ops.mean(c - r, keepdims=True))
    with pytest.raises(ValueError, match="`loss` must return one .* Received: NoneType"):
        linear_sequence_loss(hidden, KERNEL, labels, loss=lambda c, r: None)
    with pytest.raises(ValueError, match=r"`arrays` must be a tuple.* Received: ndarray. .* make `\(array,\)`"):
        linear_sequence_loss(hidden, KERNEL, labels, loss=lambda c, r, a: c - r - a, arrays=REFERENCES[0])
    with pytest.raises(ValueError, match=r"`labels` must have shape \[G, S, T\], with a known S"):
        linear_sequence_loss(hidden[0], KERNEL, labels[0], loss=dpo, arrays=REFERENCES)


@pytest.mark.parametrize("options", [{}, {"reduction": "none"}])
@pytest.mark.parametrize(
    "loss, arrays, sentence",
    [
        ("dpo", REFERENCES, "`loss` must be a function .* Received: loss='dpo'"),
        (None, REFERENCES, "`loss` must be a function .* Received: loss=None"),
        (
            dpo,
            (),
            "each of the 2 sequences.* 2 sequences and 0 arrays for `partial`, missing .* 'reference_chosen_logps'",
        ),
        (dpo, (*REFERENCES, REFERENCES[0]), "2 sequences and 3 arrays for `partial`, too many positional arguments"),
        (functools.partial(dpo, beta=0.2), REFERENCES[:1], "1 arrays for `partial`, missing .*rejected_logps'"),
    ],
)
def test_a_loss_that_is_no_function_of_these_is_named(loss, arrays, sentence, options):
    hidden, labels, _ = arrays_of(2, masked=False)
    with pytest.raises(ValueError, match=sentence):
        linear_sequence_loss(hidden, KERNEL, labels, loss=loss, arrays=arrays, **options)


def test_a_loss_whose_arguments_are_not_known_is_called():
    hidden, labels, _ = arrays_of(2, masked=False)

    class Ratio:
        __signature__ = 0  # `inspect` refuses it, as it does some functions of C

        def __call__(self, chosen, rejected):
            return chosen - rejected

    options = {"training": False, "reduction": "sum"}
    found = linear_sequence_loss(hidden, KERNEL, labels, loss=Ratio(), **options)
    expected = linear_sequence_loss(hidden, KERNEL, labels, loss=lambda c, r: c - r, **options)
    np.testing.assert_allclose(to_numpy(found), to_numpy(expected), rtol=2e-6, atol=1e-5)


def test_a_token_can_be_a_group_as_for_grpo():
    """Under the mask the advantage is 0, and so is the loss."""
    rng = np.random.default_rng(5)
    hidden = rng.standard_normal((40, FEATURES)).astype("float32")
    labels, mask = rng.integers(0, CLASSES, 40), rng.random(40) < 0.7
    old, advantages = rng.standard_normal((2, 40)).astype("float32") - [[3.0], [0.0]]
    clipped = functools.partial(kx.preference.grpo, epsilon=0.2)

    def of_groups(hidden):
        return linear_sequence_loss(
            hidden[:, None, None],
            KERNEL,
            labels[:, None, None],
            loss=functools.partial(clipped, reduction="none"),
            arrays=(old, np.where(mask, advantages, 0.0)),
            mask=mask,
            reduction="sum",
        )

    def of_log_probs(hidden):
        log_probs = kx.kernels.linear_token_statistics(hidden, KERNEL, labels, mask=mask).log_prob
        return clipped(log_probs, old, advantages, mask=mask, reduction="sum")

    found, expected = (value_and_gradient(f, tensor(hidden), mode=TWO_MODES[1]) for f in (of_groups, of_log_probs))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-6, atol=2e-6)
