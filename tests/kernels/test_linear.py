"""Facts of the linear kernel, agreement with the oracle for every input's gradient, and what it keeps in memory."""

import functools
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

from keras_xent.kernels import linear_cross_entropy, linear_token_statistics, sparse_softmax_cross_entropy
from tests import oracles
from tests.backend import BACKEND, DTYPES, MODES, every_mode, tensor, to_numpy
from tests.internals import REDUCTIONS, linear_with_ranks, set_sizes
from tests.tiers import fast_for, sample, whole

if BACKEND == "tensorflow":
    import tensorflow as tf
else:
    import jax

TOKENS, FEATURES, CLASSES = 101, 7, 37
WIDEST = DTYPES[0]
NAN = float("nan")
WEIGHTS = np.random.default_rng(9).uniform(0.2, 2, CLASSES).tolist()
OPTIONS = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.1},
    "weights": {"class_weight": WEIGHTS},
    "focal": {"focal_gamma": 1.5},
    "z-loss": {"z_loss": 0.1},
    "softcap": {"logit_softcap": 3.0},
    "all": {"label_smoothing": 0.1, "class_weight": WEIGHTS, "focal_gamma": 1.5, "z_loss": 0.01, "logit_softcap": 5.0},
}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks of at most 8 tokens made of blocks of 2; gradients in strips of 10 classes: nothing divides anything."""
    set_sizes(
        monkeypatch.setattr,
        fewest_rows=1,
        chunk_bytes=4 * CLASSES * 8,
        strip_bytes=4 * FEATURES * 10,
        block_bytes=4 * CLASSES * 2,
    )


def example(seed=0, tokens=TOKENS, features=FEATURES, classes=CLASSES):
    rng = np.random.default_rng(seed)
    hidden, kernel = rng.standard_normal((tokens, features)), rng.standard_normal((features, classes))
    return hidden, kernel, rng.standard_normal(classes), rng.integers(0, classes, tokens)


def cross_entropy(labels, **options):
    """The kernel as a function of its float inputs."""
    return lambda hidden, kernel, bias: linear_cross_entropy(hidden, kernel, labels, bias, **options)


def run(function, inputs, upstream=None, mode="eager", dtype=None):
    """`function(*inputs)`, and the gradient for each input of its product with `upstream`."""
    inputs = tuple(tensor(x, dtype or WIDEST) for x in inputs)

    def weights(value):
        return ops.ones_like(value) if upstream is None else ops.cast(upstream, value.dtype)

    if BACKEND == "tensorflow":

        def step(*inputs):
            with tf.GradientTape() as tape:
                tape.watch(inputs)
                value = function(*inputs)
            return value, tape.gradient(value, inputs, output_gradients=weights(value))
    else:

        def step(*inputs):
            value, pull = jax.vjp(function, *inputs)
            return value, pull(weights(value))

    value, gradients = MODES[mode](step)(*inputs)
    return to_numpy(value), [to_numpy(g) for g in gradients]


# Of the largest entry: a few roundings of sums of a hundred terms.
TOLERANCE = 1e-13 if WIDEST == "float64" else 2e-6


def assert_near(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=TOLERANCE * max(1e-30, np.abs(other).max(initial=0)))


def oracle(hidden, kernel, bias, labels, share, **options):
    """Losses, and the gradients of `sum(share * losses)` for hidden states, kernel and bias."""
    losses, of_logits = oracles.sparse(labels, hidden @ kernel + bias, **options)
    of_logits = of_logits * share[:, None]
    return losses, [of_logits @ kernel.T, hidden.T @ of_logits, of_logits.sum(0)]


# Facts.


def test_the_loss_is_minus_the_logarithm_of_the_probability():
    kernel = np.log([[0.2, 0.8], [0.5, 0.5]])
    losses = to_numpy(linear_cross_entropy(np.eye(2), kernel, [1, 0]))
    np.testing.assert_allclose(losses, -np.log([0.8, 0.5]), rtol=2e-6)


def test_uniform_logits_cost_log_num_classes():
    losses = to_numpy(linear_cross_entropy(np.zeros((5, 3)), np.ones((3, CLASSES)), np.arange(5)))
    np.testing.assert_allclose(losses, np.full(5, np.log(CLASSES)), rtol=2e-6)


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


# Agreement with the oracle.


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


@fast_for("17-6-38-sum", "0-3-5-sum")
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


if BACKEND == "tensorflow":

    @fast_for("graph")
    @pytest.mark.parametrize("jit", [False, True], ids=["graph", "xla"])
    def test_the_number_of_tokens_need_not_be_known(jit):
        signature = [tf.TensorSpec([None, None, FEATURES], "float64"), tf.TensorSpec([None, None], "int64")]
        kernel = tf.constant(example()[1])

        @tf.function(input_signature=signature, jit_compile=jit, autograph=False)
        def step(hidden, labels):
            with tf.GradientTape() as tape:
                tape.watch(hidden)
                loss = linear_cross_entropy(hidden, kernel, labels, ignore_class=0, reduction="sum")
            return loss, tape.gradient(loss, hidden)

        for batch, length in (1, 1), (3, 11), (0, 4):
            hidden, _, _, labels = example(2, batch * length)
            losses, (expected, _, _) = oracle(hidden, kernel.numpy(), np.zeros(CLASSES), labels, 1.0 * (labels != 0))
            shape = (batch, length)
            value, gradient = step(hidden.reshape(*shape, FEATURES), labels.reshape(shape))
            assert_near([value.numpy(), gradient.numpy().reshape(-1, FEATURES)], [losses[labels != 0].sum(), expected])

    def test_second_derivatives_raise():
        hidden, kernel, _, labels = example(tokens=9)
        hidden = tf.constant(hidden)
        for reduction in ("sum", "none"):
            with pytest.raises(NotImplementedError) as error, tf.GradientTape() as outer:
                outer.watch(hidden)
                with tf.GradientTape() as inner:
                    inner.watch(hidden)
                    loss = tf.reduce_sum(linear_cross_entropy(hidden, kernel, labels, reduction=reduction))
                outer.gradient(inner.gradient(loss, hidden), hidden)
            assert str(error.value) == (
                "`linear_cross_entropy` has no second derivatives on TensorFlow. For these, compute the logits and use "
                "`sparse_softmax_cross_entropy`."
            )

else:

    @pytest.mark.parametrize("reduction", sample(["sum", "none"], ["sum"]))
    def test_second_derivatives_are_right(reduction):
        hidden, kernel, _, labels = example(tokens=9)
        vector = np.random.default_rng(5).standard_normal(hidden.shape)
        hidden, kernel, vector = (x.astype("float32") for x in (hidden, kernel, vector))

        def along(loss):
            return jax.jvp(jax.grad(loss), (hidden,), (vector,))[1]

        ours = along(lambda h: linear_cross_entropy(h, kernel, labels, reduction=reduction).sum())
        dense = along(lambda h: sparse_softmax_cross_entropy(labels, h @ kernel).sum())
        np.testing.assert_allclose(ours, dense, atol=2e-6 * np.abs(dense).max())

    @pytest.mark.parametrize("reduction", sample(["sum", "none"], ["sum"]))
    def test_second_derivatives_of_a_new_head_of_zeros_are_right(reduction):
        hidden, kernel, _, labels = example(tokens=9)
        zeros, vector = np.zeros(kernel.shape, "float32"), kernel.astype("float32")
        got = jax.jvp(
            jax.grad(lambda k: linear_cross_entropy(hidden.astype("float32"), k, labels, reduction=reduction).sum()),
            (zeros,),
            (vector,),
        )[1]
        slopes = hidden @ kernel
        expected = hidden.T @ (slopes - slopes.mean(axis=1, keepdims=True)) / CLASSES
        np.testing.assert_allclose(got, expected, atol=2e-6 * np.abs(expected).max())

    def test_only_the_needed_gradients_are_computed():
        hidden, kernel, _, labels = example()
        hidden, kernel = hidden.astype("float32"), kernel.astype("float32")

        def products(argument):
            f = lambda h, k: linear_cross_entropy(h, k, labels, reduction="sum")  # noqa: E731
            return str(jax.make_jaxpr(jax.grad(f, argument))(hidden, kernel)).count("dot_general")

        assert products((0, 1)) > products(0)


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
    np.testing.assert_allclose(gradient, expected[0], atol=0.01 * np.abs(expected[0]).max())


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


# Statistics.


def ranks(logits, labels):
    """The place of each label in the stable order of the logits, largest first."""
    return (np.argsort(-logits, axis=1, kind="stable") == labels[:, None]).argmax(1)


def test_statistics_are_the_plain_cross_entropy_and_the_rank_of_the_label():
    hidden, kernel, bias, labels = example()
    labels[:50] = (hidden @ kernel + bias)[:50].argmax(1)
    mask = np.random.default_rng(7).uniform(size=TOKENS) < 0.6
    _, known = linear_with_ranks(hidden, kernel, labels, bias, mask=mask, reduction="sum", **OPTIONS["all"])
    capped = 5.0 * np.tanh((hidden @ kernel + bias) / 5.0)
    np.testing.assert_allclose(to_numpy(known.nll), np.where(mask, oracles.sparse(labels, capped)[0], 0), rtol=1e-5)
    assert to_numpy(known.rank).tolist() == np.where(mask, ranks(hidden @ kernel + bias, labels), 0).tolist()


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


def test_of_equal_logits_the_first_has_rank_0():
    _, known = linear_with_ranks(np.zeros((3, 2)), np.ones((2, 4)), [0, 1, 3])
    assert to_numpy(known.rank).tolist() == [0, 1, 3]


# What is kept in memory.


@fast_for("all-token_mean")
@pytest.mark.parametrize(
    "options, reduction",
    sample(
        [(options, r) for options in ("plain", "smoothing", "all") for r in ("token_mean", "none")],
        [("plain", "none"), ("all", "token_mean")],
    ),
)
def test_no_buffer_of_the_size_of_the_logits_is_made(monkeypatch, options, reduction):
    tokens, features, classes = 1500, 8, 1009
    set_sizes(monkeypatch.setattr, chunk_bytes=4 * classes * 50, block_bytes=4 * classes * 10)
    hidden, kernel, _, labels = example(0, tokens, features, classes)
    hidden, kernel = hidden.astype("float32"), kernel.astype("float32")
    options = {**OPTIONS[options], "reduction": reduction, "ignore_class": 0}
    if "class_weight" in options:
        options["class_weight"] = np.linspace(0.5, 2.0, classes)

    def f(hidden, kernel):
        loss, known = linear_with_ranks(hidden, kernel, labels, **options)
        return ops.sum(loss), known

    if BACKEND == "jax":
        program = jax.jit(jax.value_and_grad(f, (0, 1), has_aux=True)).lower(hidden, kernel).compile()
        assert program.memory_analysis().temp_size_in_bytes < 0.2 * 4 * tokens * classes
        text = program.as_text()
    else:

        def step(hidden, kernel):
            with tf.GradientTape() as tape:
                tape.watch([hidden, kernel])
                loss, known = f(hidden, kernel)
            return loss, known, tape.gradient(loss, [hidden, kernel])

        program = tf.function(step, jit_compile=True, autograph=False)
        text = program.experimental_get_compiler_ir(tf.constant(hidden), tf.constant(kernel))(stage="optimized_hlo")
    assert f"[{tokens},{classes}]" not in text
    assert f"[50,{classes}]" in text
    # The gradient of a chunk takes the place of its logits: XLA copies them if something else still has to read them.
    assert not re.search(rf"f32\[50,{classes}\]\S* copy\(", text)


if BACKEND == "jax":

    @pytest.mark.parametrize("platform", sample(["cpu", "cuda", "tpu"], ["tpu"]))
    def test_it_lowers_for_every_platform(platform):
        from jax import export

        for dtype in ("float32", "bfloat16"):
            hidden, kernel, _, labels = example()
            f = functools.partial(linear_cross_entropy, labels=labels, ignore_class=0, reduction="token_mean")
            step = jax.jit(jax.value_and_grad(f, (0, 1)))
            exported = export.export(step, platforms=[platform])(*(tensor(x, dtype) for x in (hidden, kernel)))
            assert exported.platforms == (platform,)
