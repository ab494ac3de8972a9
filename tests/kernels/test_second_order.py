"""Forward mode, and second derivatives where a row does not count or its loss has reached 0."""

import numpy as np
import pytest

from keras_xent.kernels import sigmoid_cross_entropy, softmax_cross_entropy, sparse_softmax_cross_entropy
from tests.backend import BACKEND, MODES, TWO_MODES, every_mode, hessian_vector_product, tensor, to_numpy
from tests.internals import reduce
from tests.tiers import fast_for, sample, whole

INF, NAN = float("inf"), float("nan")
ONE_HOT = np.eye(3, dtype="float32")[[0, 0]]
KERNELS = {
    "sparse": lambda x, **options: sparse_softmax_cross_entropy(np.array([0, 0]), x, **options),
    "dense": lambda x, **options: softmax_cross_entropy(ONE_HOT, x, **options),
    "sigmoid": lambda x, **options: sigmoid_cross_entropy(ONE_HOT, x, **options),
}
every_kernel = pytest.mark.parametrize("kernel", KERNELS)


def _gradient_penalty(function, x, mode):
    """The gradient of the squared norm of the gradient."""
    if BACKEND == "tensorflow":
        import tensorflow as tf

        def run(x):
            with tf.GradientTape() as outer:
                outer.watch(x)
                with tf.GradientTape() as inner:
                    inner.watch(x)
                    loss = function(x)
                norm = tf.reduce_sum(inner.gradient(loss, x) ** 2)
            return outer.gradient(norm, x)
    else:
        import jax

        def run(x):
            return jax.grad(lambda x: (jax.grad(lambda x: function(x).sum())(x) ** 2).sum())(x)

    return to_numpy(MODES[mode](run)(x))


@fast_for("sparse-*")
@every_mode
@pytest.mark.parametrize(
    "kernel, how",
    sample(
        [
            (k, how)
            for k in KERNELS
            for how in ("mask", "ignore_class", "weight 0")
            if (k, how) != ("dense", "ignore_class")
        ],
        [("sparse", "ignore_class"), ("dense", "mask"), ("sigmoid", "weight 0")],
    ),
)
def test_gradient_penalties_of_masked_rows_are_0(kernel, how, mode):
    options, weights = {}, np.array([[1.0], [0.0]], "float32")
    if how == "mask":
        options["mask"] = np.array([True, False]) if kernel != "sigmoid" else np.array([[True] * 3, [False] * 3])
    function = lambda x: KERNELS[kernel](x, **options)  # noqa: E731
    if how == "ignore_class":
        y = np.array([0, -1]) if kernel == "sparse" else np.where([[True], [False]], ONE_HOT, -1)
        named = sparse_softmax_cross_entropy if kernel == "sparse" else sigmoid_cross_entropy
        function = lambda x: named(y, x, ignore_class=-1)  # noqa: E731
    elif how == "weight 0":
        plain = function
        # As losses reduce: what is not finite under weight 0 is selected away.
        function = lambda x: reduce(  # noqa: E731
            plain(x), reduction=None, weights=weights if kernel == "sigmoid" else weights[:, 0]
        )
    logits = np.array([[1.0, 2.0, 0.5], [NAN, INF, 1.0]], "float32")
    penalty = _gradient_penalty(function, tensor(logits), mode)
    logits[1] = 0
    assert np.array_equal(penalty, _gradient_penalty(function, tensor(logits), mode))
    assert penalty[0].any() and not penalty[1].any()


@whole
@every_mode
@pytest.mark.parametrize("gamma", sample([0.5, 1.5], [0.5]))
@every_kernel
def test_focal_second_derivatives_are_0_where_1_minus_p_underflows(kernel, gamma, mode):
    x = tensor([[150.0, -150.0, -150.0]] * 2, "float32")
    product = hessian_vector_product(
        lambda x: KERNELS[kernel](x, focal_gamma=gamma), x, tensor([[1.0, -2.0, 0.5]] * 2, "float32"), 1.0, mode
    )
    assert np.array_equal(product, np.zeros((2, 3)))


@whole
@every_mode
@every_kernel
def test_second_derivatives_for_16_bit_logits_are_those_for_float32(kernel, mode):
    """Also where the gradient is rounded by its bits."""
    x, v = [[1.0, 2.0, 0.5], [0.0, 1.0, -1.0]], [[1.0, 0.0, -1.0], [0.5, 2.0, 1.0]]
    short, long = (
        hessian_vector_product(KERNELS[kernel], tensor(x, dtype), tensor(v, dtype), 1.0, mode)
        for dtype in ("bfloat16", "float32")
    )
    # What is rounded on the way is at most 2.
    np.testing.assert_allclose(short, long, atol=2**-8)
    assert np.abs(short).max() > 0.2


@pytest.mark.skipif(BACKEND != "tensorflow", reason="JAX refuses forward mode of the loss; tested with the losses")
@pytest.mark.whole
@pytest.mark.parametrize("mode", list(MODES))
@every_kernel
def test_forward_mode_is_right_over_the_loss_and_over_its_gradient(kernel, mode):
    import tensorflow as tf

    x = tf.constant([[1.0, 2.0, 0.5], [1.0, 1.0, -1.0]])
    v = tf.constant([[1.0, 0.0, -1.0], [0.5, 2.0, 1.0]])

    def run(x):
        with tf.autodiff.ForwardAccumulator(x, v) as accumulator:
            with tf.GradientTape() as tape:
                tape.watch(x)
                loss = tf.reduce_sum(KERNELS[kernel](x))
            gradient = tape.gradient(loss, x)
        return gradient, accumulator.jvp(loss), accumulator.jvp(gradient)

    gradient, slope, product = MODES[mode](run)(x)
    np.testing.assert_allclose(slope, np.sum(gradient * v), rtol=2e-6)
    p = np.exp(x) / np.exp(x).sum(axis=1, keepdims=True) if kernel != "sigmoid" else 1 / (1 + np.exp(-x))
    mean = (p * v).numpy().sum(axis=1, keepdims=True) if kernel != "sigmoid" else p * v
    np.testing.assert_allclose(product, p * (v - mean), atol=1e-6)
    if kernel == "sparse":
        np.testing.assert_allclose(product[0], [0.2102, -0.0572, -0.1530], atol=1e-4)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="as above")
def test_forward_mode_through_blocks_of_rows_is_refused_in_a_graph():
    """XLA has no derivative of a loop of unknown length; eagerly the derivative goes another way and is right."""
    import tensorflow as tf

    @tf.function(autograph=False, input_signature=[tf.TensorSpec([None, 2048])])
    def run(x):
        with tf.autodiff.ForwardAccumulator(x, tf.ones_like(x)) as accumulator:
            loss = softmax_cross_entropy(tf.one_hot([0, 0], 2048), x)
        return accumulator.jvp(loss)

    with pytest.raises(LookupError, match="No gradient defined"):
        run(tf.zeros((2, 2048)))


@pytest.mark.skipif(BACKEND != "tensorflow", reason="as above")
def test_forward_mode_through_a_smoothed_label_in_a_graph():
    import tensorflow as tf

    @tf.function(autograph=False, input_signature=[tf.TensorSpec([None, 3])])
    def run(x):
        with tf.autodiff.ForwardAccumulator(x, tf.constant([[0.0, 1.0, 0.0]])) as accumulator:
            loss = sparse_softmax_cross_entropy(tf.constant([0]), x, label_smoothing=0.3)
        return accumulator.jvp(loss)

    np.testing.assert_allclose(
        run(tf.constant([[1.0, 2.0, 3.0]])), [np.exp(2) / np.exp([1, 2, 3]).sum() - 0.1], rtol=1e-6
    )


@every_mode
@every_kernel
def test_the_derivative_for_the_upstream_gradient_is_the_gradient_even_at_0(kernel, mode):
    """What learning to reweight examples starts from: weights of 0 that have a gradient."""
    x, v = (
        tensor([[1.0, 2.0, 0.5], [0.0, 1.0, -1.0]], "float32"),
        tensor([[1.0, 0.0, -1.0], [0.5, 2.0, 1.0]], "float32"),
    )
    u = tensor(np.zeros((2, 3) if kernel == "sigmoid" else (2,)), "float32")
    if BACKEND == "tensorflow":
        import tensorflow as tf

        def run(u):
            with tf.GradientTape() as outer:
                outer.watch(u)
                with tf.GradientTape() as inner:
                    inner.watch(x)
                    loss = KERNELS[kernel](x)
                gradient = inner.gradient(loss, x, output_gradients=u)
            return outer.gradient(gradient, u, output_gradients=v), gradient
    else:
        import jax

        def run(u):
            pull = jax.vjp(KERNELS[kernel], x)[1]
            gradient, again = jax.vjp(lambda u: pull(u)[0], u)
            return again(v)[0], gradient

    slope, gradient = map(to_numpy, MODES[mode](run)(u))
    assert not gradient.any()
    x, v = to_numpy(x), to_numpy(v)
    if kernel == "sigmoid":
        expected = (1 / (1 + np.exp(-x)) - ONE_HOT) * v
    else:
        expected = ((np.exp(x) / np.exp(x).sum(axis=1, keepdims=True) - ONE_HOT) * v).sum(axis=1)
    np.testing.assert_allclose(slope, expected, rtol=2e-6, atol=1e-7)


@fast_for("dense-*")
@pytest.mark.parametrize("kernel, shape", [("sparse", (1000, 10)), ("dense", (14_000, 10)), ("sparse", (80, 128))])
def test_second_derivatives_of_compiled_steps_with_masked_rows(kernel, shape):
    """Of so many numbers a program of both passes has formulas of its own, `_fast_steps.py`."""
    rng, (rows, classes) = np.random.default_rng(0), shape
    x, v = rng.standard_normal((2, rows, classes)).astype("float32")
    x[1], x[2, 3] = NAN, INF
    labels, mask = rng.integers(0, classes, rows), np.arange(rows) > 2
    one_hot = np.eye(classes, dtype="float32")[labels]

    def loss(x):
        if kernel == "sparse":
            return sparse_softmax_cross_entropy(labels, x, mask=mask)
        return softmax_cross_entropy(one_hot, x, mask=mask)

    product = hessian_vector_product(loss, tensor(x), tensor(v), 1.0, TWO_MODES[1])
    p = np.exp(np.where(mask[:, None], x, 0))
    p /= p.sum(axis=1, keepdims=True)
    expected = p * (v - (p * v).sum(axis=1, keepdims=True)) * mask[:, None]
    np.testing.assert_allclose(product, expected, atol=1e-6)
