"""Where `keras.losses` trains wrongly, in silence or with an odd error, and what is right.

Each test is named after what is right and holds the exact answer.
"""

import math
import subprocess
import sys
import textwrap

import keras
import numpy as np
import pytest
from keras import ops

import keras_xent as kx
from tests.backend import (
    BACKEND,
    MODES,
    environment,
    every_mode,
    hessian_vector_product,
    skip_on_accelerator,
    tensor,
    tensorflow_only,
    to_numpy,
)
from tests.losses.cases import LOW_PRECISION, Binary, Categorical, Sequence, Sparse, example
from tests.losses.running import assert_close, run, value
from tests.tiers import fast_for, sample, whole

# Labels are integers


@pytest.mark.parametrize("policy", sample(["float32", "mixed_bfloat16", "mixed_float16"], ["mixed_bfloat16"]))
def test_training_in_low_precision_trains_the_class_of_the_label(policy):
    model = keras.Sequential(
        [keras.Input((1,)), keras.layers.Dense(2100, use_bias=False, kernel_initializer="zeros", dtype=policy)]
    )
    loss = Sparse(from_logits=True, dtype="bfloat16" if policy == "mixed_bfloat16" else "float16")
    model.compile(keras.optimizers.SGD(1.0), loss)
    model.fit(np.ones((1, 1)), np.array([2049]), verbose=0)
    kernel = ops.convert_to_numpy(model.layers[0].kernel)[0]
    assert np.argmax(kernel) == 2049
    assert_close(kernel[2049], 1 - 1 / 2100, rtol=2**-9)


NARROW = textwrap.dedent("""
    import sys, keras, numpy as np
    from keras_xent.losses import SparseCategoricalCrossentropy
    from tests.losses.running import run
    loss = SparseCategoricalCrossentropy(from_logits=True)
    for dtype in ("int16", "uint16"):
        for classes in (7, 8):
            labels, logits = np.arange(4), np.arange(4.0 * classes, dtype="float32").reshape(4, classes) % 5
            expected = run(loss, labels, logits)
            result = run(loss, labels.astype(dtype), logits, mode=sys.argv[1])
            np.testing.assert_allclose(result[0], expected[0], rtol=2e-6)
            np.testing.assert_allclose(result[1], expected[1], atol=1e-6)
            model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(classes)])
            model.compile("sgd", loss, jit_compile=True)
            model.fit(np.ones((4, 3)), labels.astype(dtype), verbose=0)
            print(dtype, classes, "trained")
""")


@whole
def test_narrow_labels_do_not_abort_the_process():
    """XLA on the CPU has no code for some of their shapes; the abort would take the tests with it."""
    command = [sys.executable, "-c", NARROW, list(MODES)[-1]]
    child = subprocess.run(command, env=environment(), capture_output=True, text=True)
    trained = [f"{dtype} {classes} trained" for dtype in ("int16", "uint16") for classes in (7, 8)]
    assert child.stdout.splitlines() == trained, child.stderr[-2000:]


def test_labels_and_predictions_may_be_python_lists():
    # As in the examples of Keras' documentation.
    for loss in Sparse(), Sequence(from_logits=False):
        assert_close(value(loss, [1, 2], [[0.05, 0.95, 0.0], [0.1, 0.8, 0.1]]), -(math.log(0.95) + math.log(0.1)) / 2)


@pytest.mark.whole
def test_labels_may_be_python_lists():
    logits = tensor(np.array([[2.0, 1.0], [0.0, 3.0]], "float32"))
    expected = (math.log1p(math.exp(-1)) + math.log1p(math.exp(-3))) / 2
    assert_close(value(Sparse(from_logits=True), [0, 1], logits), expected)
    assert_close(value(Sequence(), [0, 1], logits), expected)
    assert_close(value(Categorical(from_logits=True), [[1, 0], [0, 1]], logits), expected)
    assert_close(value(Sparse(from_logits=True), [[0], [1]], logits, [1.0, 1.0]), expected)
    expected = np.mean([math.log1p(math.exp(x)) for x in (-2, -1, 0, -3)])
    assert_close(value(Binary(from_logits=True), [[1, 1], [1, 1]], logits), expected)


# Labels that are no class


def _poisoned(label):
    """Two good rows around one whose label is no class."""
    return np.array([0, label, 2]), np.array([[1.0, 2, 3], [1, 2, 3], [1, 2, 3]], "float32")


@pytest.mark.parametrize("label", [3, -1, 1.5])
@tensorflow_only(reason="JAX has no graph in which values could be looked at")
def test_an_out_of_range_label_is_named_by_a_graph_on_the_cpu(label):
    import tensorflow as tf

    skip_on_accelerator("a check would make the device wait, so the loss is NaN there")
    labels, logits = _poisoned(label)
    parts = rf"classes from 0 to .*Received: label\] \[{label}\] \[at flat position\] \[1\] .*number of classes\] \[3\]"
    with pytest.raises(tf.errors.InvalidArgumentError, match=parts):
        run(Sparse(from_logits=True), labels, logits, mode="graph")


# Huge logits, reduced; infinite and confident ones are in test_edge_rows.py


@whole
@every_mode
@pytest.mark.parametrize("size", sample([1e4, 1e30], [1e30]))
def test_huge_logits_have_finite_losses_and_gradients(size, mode):
    x = np.array([[size, -size, 0.0]], "float32")
    exact = float(x[0, 0])
    for loss, y in [(Sparse, np.array([1])), (Categorical, np.array([[0, 1, 0]])), (Sequence, np.array([1]))]:
        result, gradient = run(loss(from_logits=True), y, x, mode=mode)
        assert_close(result, 2 * exact)
        assert np.array_equal(gradient, [[1, -1, 0]])
    result, gradient = run(Binary(from_logits=True), np.array([[0, 1, 1]]), x, mode=mode)
    assert_close(result, (2 * exact + math.log(2)) / 3)
    assert_close(gradient, np.array([[1, -1, -0.5]]) / 3)


# Focal factors


@every_mode
def test_focal_rows_that_are_wrong_with_certainty_learn(mode):
    x, y = np.array([[100.0, 0.0]], "float32"), np.array([[0, 1]])
    loss, gradient = run(Categorical(from_logits=True, focal_gamma=2.0), y, x, mode=mode)
    assert_close(loss, 100.0)
    assert_close(gradient, [[1.0, -1.0]])


@every_mode
@pytest.mark.parametrize("gamma", sample([0.25, 0.5, 1.0, 2.0], [0.25, 2.0]))
def test_focal_factors_below_1_have_a_gradient_where_the_model_is_right_with_certainty(gamma, mode):
    """`u^gamma L` with `u` and `L` both exp(-40): slope `-(1 + gamma) exp(-40)^(1 + gamma)`."""
    x = np.array([[40.0]], "float32")
    loss, gradient = run(Binary(from_logits=True, focal_gamma=gamma), np.array([[1]]), x, mode=mode)
    size = math.exp(-40 * (1 + gamma))
    # Below float32's normal numbers a number may be flushed to 0.
    floor = {"atol": 1.2e-38}
    np.testing.assert_allclose(loss, size, rtol=2e-6, **floor)
    np.testing.assert_allclose(gradient, [[-(1 + gamma) * size]], rtol=2e-6, **floor)


# Targets that are no distribution


@every_mode
def test_an_all_zero_target_has_loss_0_and_gradient_0(mode):
    for smoothing in (0.0, 0.1):
        loss = Categorical(from_logits=True, label_smoothing=smoothing)
        result, gradient = run(loss, np.zeros((1, 3)), np.array([[0.0, 2.0, 1.0]], "float32"), mode=mode)
        assert result == 0
        assert np.array_equal(gradient, np.zeros((1, 3)))


@every_mode
def test_a_target_of_2_has_the_gradient_of_its_loss(mode):
    x = np.array([[0.0, 2.0, 1.0]], "float32")
    result, gradient = run(Categorical(from_logits=True), np.array([[2, 0, 0]]), x, mode=mode)
    p = np.exp([0.0, 2, 1]) / np.exp([0.0, 2, 1]).sum()
    assert_close(result, -2 * math.log(p[0]))
    assert_close(gradient, [2 * p - [2, 0, 0]])


# Label smoothing


@fast_for("-1")
@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_smoothing_spreads_over_the_class_axis(axis):
    """With uniform logits every distribution has loss log C; one spread over another axis does not sum to 1."""
    shape = [2, 2, 2]
    shape[axis] = 3
    y = np.zeros(shape)
    np.moveaxis(y, axis, 0)[0] = 1
    x = np.zeros(shape, "float32")
    assert_close(value(Categorical(from_logits=True, label_smoothing=0.3, axis=axis), y, x), math.log(3))
    x = np.random.default_rng(13).normal(size=shape).astype("float32")
    ours = value(Categorical(from_logits=True, label_smoothing=0.3, axis=axis), y, x)
    at_the_end = keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=0.3)
    assert_close(ours, value(at_the_end, np.moveaxis(y, axis, -1), np.moveaxis(x, axis, -1)))


def test_sparse_labels_are_smoothed_together_with_ignore_class():
    x = np.array([[0.0, 2.0, 1.0], [math.nan] * 3], "float32")
    loss, gradient = run(Sparse(from_logits=True, ignore_class=-1, label_smoothing=0.3), np.array([0, -1]), x)
    log_p = np.array([0.0, 2, 1]) - np.log(np.exp([0.0, 2, 1]).sum())
    assert_close(loss, -(np.array([0.8, 0.1, 0.1]) * log_p).sum())
    assert_close(gradient, [np.exp(log_p) - [0.8, 0.1, 0.1], [0, 0, 0]])


# Class axes


@whole
@every_mode
@pytest.mark.parametrize("axis", sample([0, 1], [0]))
def test_sparse_losses_take_any_axis(axis, mode):
    y = np.array([[0, 1, 2], [2, 1, 0]])
    x = np.random.default_rng(14).normal(size=(2, 3, 4)).astype("float32")
    expected, expected_gradient = run(Sparse(from_logits=True), y, x)
    result, gradient = run(Sparse(from_logits=True, axis=axis), y, np.moveaxis(x, -1, axis), mode=mode)
    assert_close(result, expected)
    assert_close(np.moveaxis(gradient, axis, -1), expected_gradient, scale=1e-6)


# Weights and masks


def test_one_sample_weight_per_example_weighs_examples():
    """[B] lines up with the examples, also where there are as many time steps as examples."""
    labels, logits = example("SparseCategoricalCrossentropy", (3, 3), missing=False)
    single = value(Sparse(from_logits=True, reduction=None), labels, logits)
    weights = np.array([1.0, 2.0, 4.0], "float32")
    expected = (single * weights[:, None]).sum() / 9
    assert_close(value(Sparse(from_logits=True), labels, logits, weights), expected)
    assert abs(expected - (single * weights).sum() / 9) > 0.1
    assert_close(
        value(Sparse(from_logits=True), labels[:2], logits[:2], weights[:2]),
        (single[:2] * weights[:2, None]).sum() / 6,
    )


@every_mode
def test_a_mask_on_a_binary_output_masks_its_labels(mode):
    """`[B, T]` outputs with a `[B, T]` mask, as a tagger without a class axis has them."""
    y, x = np.array([[1, 0, 1], [0, 1, 1]]), np.array([[1.0, -2.0, 9.0], [3.0, math.nan, 9.0]], "float32")
    mask = np.array([[True, True, False], [True, False, False]])
    loss, gradient = run(Binary(from_logits=True), y, x, mask=mask, mode=mode)
    rows = [np.mean([math.log1p(math.exp(-1)), math.log1p(math.exp(-2))]), math.log1p(math.exp(3))]
    assert_close(loss, np.mean(rows))
    p = [1 / (1 + math.e), 1 / (1 + math.exp(2)), 1 / (1 + math.exp(-3))]
    assert_close(gradient, [[-p[0] / 4, p[1] / 4, 0], [p[2] / 2, 0, 0]])


@pytest.mark.parametrize("dtype", sample(["float32", *LOW_PRECISION], ["float16"]))
def test_an_empty_batch_has_a_scalar_loss_of_0(dtype):
    loss = Sparse(from_logits=True, reduction="sum", dtype=dtype)(np.zeros((0,), "int32"), np.zeros((0, 3), "float32"))
    assert loss.shape == ()
    assert float(loss) == 0


# Sums in 16 bits


@every_mode
@pytest.mark.parametrize("dtype", sample(["float32", *LOW_PRECISION], ["float16"]))
@pytest.mark.parametrize("rows, classes", sample([(70000, 2), (12000, 1000)], [(70000, 2)]))
def test_the_mean_of_many_equal_losses_does_not_overflow_or_round(rows, classes, dtype, mode):
    """Summed in 16 bits it would be inf, or 0 where the count is inf."""
    logits = tensor(np.zeros((rows, classes), "float16"), dtype)
    loss, gradient = run(Sparse(from_logits=True, dtype=dtype), np.zeros(rows, "int32"), logits, mode=mode)
    assert_close(loss, to_numpy(tensor(np.float32(math.log(classes)), dtype)))
    assert (gradient[:, 0] < 0).all()


# Means over tokens


@whole
@pytest.mark.parametrize("batch_size", sample([1, 2, 4], [2]))
def test_the_logged_perplexity_weighs_tokens_not_batches(batch_size):
    """Rows of 6, 6, 2 and 0 tokens; Keras' logged loss is a mean over batches."""
    rng = np.random.default_rng(15)
    labels = rng.integers(0, 5, (4, 6))
    for row, valid in zip(labels, (6, 6, 2, 0), strict=True):
        row[valid:] = -1
    model = keras.Sequential([keras.Input((6, 3)), keras.layers.Dense(5)])
    model.compile(loss=Sequence(ignore_class=-1), metrics=[kx.metrics.Perplexity(ignore_class=-1)])
    x = rng.normal(size=(4, 6, 3)).astype("float32")
    perplexity = model.evaluate(x, labels, batch_size=batch_size, verbose=0, return_dict=True)["perplexity"]
    assert_close(perplexity, math.exp(value(Sequence(ignore_class=-1), labels, model(x))), rtol=2e-6)


@whole
def test_ignored_rows_are_not_averaged_as_rows_of_loss_0():
    """Two of four labels ignored, uniform over 4 classes: 1.3863, not half of it."""
    y, x = np.array([0, -1, 3, -1]), np.zeros((4, 4), "float32")
    for reduction in ("token_mean", "mean_with_sample_weight", "sum_over_batch_size"):
        assert_close(value(Sparse(from_logits=True, ignore_class=-1, reduction=reduction), y, x), math.log(4))
    metric = kx.metrics.Perplexity(ignore_class=-1)
    metric.update_state(y, x)
    assert_close(to_numpy(metric.result()), 4.0)


# Higher derivatives, here of the plain losses; those of the kernels are held to the oracle with all options

SECOND_ORDER = [
    ("BinaryCrossentropy", Binary(from_logits=True, reduction="sum")),
    ("CategoricalCrossentropy", Categorical(from_logits=True, reduction="sum")),
    ("SparseCategoricalCrossentropy", Sparse(from_logits=True, reduction="sum")),
]


def _hessian_times(name, logits, vector):
    """Closed form: `p (1 - p) v` over the number of labels, and `p v - p (p . v)`."""
    x, v = logits.astype("float64"), vector.astype("float64")
    if name == "BinaryCrossentropy":
        p = 1 / (1 + np.exp(-x))
        return p * (1 - p) * v / x.shape[-1]
    p = np.exp(x) / np.exp(x).sum(axis=-1, keepdims=True)
    return p * v - p * (p * v).sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("mode", MODES)
@whole
@pytest.mark.parametrize("name, loss", SECOND_ORDER)
def test_hessian_vector_products_are_right(name, loss, mode):
    labels, logits = example(name, missing=False)
    vector = np.random.default_rng(16).normal(size=logits.shape).astype("float32")
    product = hessian_vector_product(lambda x: loss(labels, x), tensor(logits), tensor(vector), 1.0, mode)
    assert_close(product, _hessian_times(name, logits, vector), scale=1e-6)


@whole
@pytest.mark.parametrize("name, loss", sample(SECOND_ORDER, [SECOND_ORDER[2]]))
def test_forward_mode_is_right_or_refused(name, loss):
    """Right on TensorFlow; JAX has none for functions with a gradient of their own, and says so."""
    labels, logits = example(name, missing=False)
    vector = np.random.default_rng(16).normal(size=logits.shape).astype("float32")
    x, v = tensor(logits), tensor(vector)
    if BACKEND == "jax":
        import jax

        with pytest.raises(TypeError, match="forward-mode"):
            jax.jvp(lambda x: loss(labels, x), (x,), (v,))
        return
    import tensorflow as tf

    _, gradient = run(loss, labels, logits)
    with tf.autodiff.ForwardAccumulator(x, v) as accumulator:
        result = loss(labels, x)
    assert_close(accumulator.jvp(result), (gradient * vector).sum(), rtol=5e-6)
