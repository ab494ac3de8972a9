"""What the linear kernel is compiled to: unknown numbers of tokens, higher derivatives, memory, other platforms."""

import functools
import re

import numpy as np
import pytest
from keras import ops

from keras_xent.kernels import linear_cross_entropy, sparse_softmax_cross_entropy
from tests.backend import BACKEND, optimized_hlo, skip_on_accelerator, tensor, with_gradients
from tests.internals import set_sizes
from tests.kernels.linear_examples import (
    CLASSES,
    FEATURES,
    OPTIONS,
    assert_near,
    example,
    oracle,
    set_small_chunks,
)
from tests.tiers import fast_for, sample

if BACKEND == "tensorflow":
    import tensorflow as tf
else:
    import jax


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    set_small_chunks(monkeypatch)


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
                "What is computed without logits has no second derivatives on TensorFlow. For these, compute the "
                "logits, and use a loss or kernel of logits, such as `sparse_softmax_cross_entropy`."
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
        loss, known = linear_cross_entropy(hidden, kernel, labels, **options, return_statistics=["rank"])
        return ops.sum(loss), known

    if BACKEND == "jax":
        program = jax.jit(with_gradients(f)).lower(hidden, kernel).compile()
        assert program.memory_analysis().temp_size_in_bytes < 0.2 * 4 * tokens * classes
        text = program.as_text()
    else:
        text = optimized_hlo(with_gradients(f), hidden, kernel)
    assert f"[{tokens},{classes}]" not in text
    assert f"[50,{classes}]" in text
    # The gradient of a chunk takes the place of its logits: XLA copies them if something else still has to read them.
    assert not re.search(rf"f32\[50,{classes}\]\S* copy\(", text)


if BACKEND == "jax":

    def test_one_chunk_of_logits_is_in_memory():
        skip_on_accelerator("the gradient has memory of its own there, of half the size in 16 bits")
        tokens, features, classes = 2048, 8, 1000
        chunk_bytes = 4 * 256 * classes
        hidden, kernel, _, labels = example(0, tokens, features, classes)
        f = functools.partial(linear_cross_entropy, labels=labels, reduction="token_mean", chunk_bytes=chunk_bytes)
        step = jax.jit(jax.value_and_grad(f, (0, 1)))
        program = step.lower(hidden.astype("float32"), kernel.astype("float32")).compile()
        # The exponentials, which are changed at the label, do not get a second one.
        assert program.memory_analysis().temp_size_in_bytes < 1.5 * chunk_bytes

    @pytest.mark.parametrize("platform", sample(["cpu", "cuda", "tpu"], ["tpu"]))
    def test_it_lowers_for_every_platform(platform):
        from jax import export

        for dtype in ("float32", "bfloat16"):
            hidden, kernel, _, labels = example()
            f = functools.partial(linear_cross_entropy, labels=labels, ignore_class=0, reduction="token_mean")
            step = jax.jit(jax.value_and_grad(f, (0, 1)))
            exported = export.export(step, platforms=[platform])(*(tensor(x, dtype) for x in (hidden, kernel)))
            assert exported.platforms == (platform,)
