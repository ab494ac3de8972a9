"""New numbers of rows need no new programs, and the rows that are added for it are seen by nothing."""

import numpy as np
import pytest

from keras_xent import kernels
from keras_xent._backend._buckets import bucket_of, buckets
from keras_xent.kernels import sparse_softmax
from tests import internals
from tests.backend import BACKEND, hessian_vector_product, tensor, to_numpy, value_and_gradient
from tests.tiers import fast_for

CLASSES = 7


def data(rows, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((rows, CLASSES)).astype("float32"), rng.integers(0, CLASSES, rows).astype("int32")


def closed_form(x, labels):
    """Losses and their gradients in float64."""
    x = x.astype("float64")
    p = np.exp(x) / np.exp(x).sum(axis=1, keepdims=True)
    one_hot = np.eye(CLASSES)[labels]
    return -np.log((p * one_hot).sum(axis=1)), p - one_hot


def test_buckets_waste_at_most_a_quarter_and_have_a_smallest_of_a_megabyte():
    assert buckets(500)[:5] == (512, 640, 768, 896, 1024)
    assert bucket_of(8, 32000) == 8 and bucket_of(3, 32000) == 8
    assert bucket_of(1, 10) == 512
    for rows in range(512, 5000, 7):
        assert rows <= bucket_of(rows, 500) <= 1.25 * rows
    # Powers of two, and these times 5, 6 and 7, stay what they are.
    assert all(bucket_of(k * 1024, None) == k * 1024 for k in (1, 2, 3, 4, 5, 6, 7, 8))


LOSSES = {
    "sparse": lambda labels, x: kernels.sparse_softmax_cross_entropy(labels, x),
    "dense": lambda labels, x: kernels.softmax_cross_entropy(np.eye(CLASSES, dtype="float32")[labels], x),
    "linear": lambda labels, x: kernels.linear_cross_entropy(x, np.eye(CLASSES, dtype="float32"), labels),
}


@fast_for("sparse")
@pytest.mark.parametrize("name", LOSSES)
def test_values_and_gradients_of_sizes_within_a_bucket(name):
    for rows in (3, 513):
        x, labels = data(rows)
        loss, gradient = value_and_gradient(lambda x, y=labels: LOSSES[name](y, x), tensor(x))
        expected = closed_form(x, labels)
        assert loss.shape == (rows,)
        np.testing.assert_allclose(loss, expected[0], rtol=2e-6, atol=1e-6)
        np.testing.assert_allclose(gradient, expected[1], atol=1e-6)


def test_the_mean_over_the_labels_of_an_example():
    x, _ = data(5)
    labels = (x > 0.3).astype("float32")
    mask = np.ones_like(x, dtype=bool)
    mask[2] = False
    loss, gradient = value_and_gradient(
        lambda x: kernels.sigmoid_cross_entropy(labels, x, axis=-1, mask=mask), tensor(x)
    )
    x = x.astype("float64")
    each = np.where(mask, np.log1p(np.exp(-np.abs(x))) + np.maximum(x, 0) - x * labels, 0)
    np.testing.assert_allclose(loss, each.sum(axis=1) / CLASSES, rtol=2e-6, atol=1e-7)
    np.testing.assert_allclose(gradient, np.where(mask, 1 / (1 + np.exp(-x)) - labels, 0) / CLASSES, atol=1e-7)


def test_a_class_axis_in_the_middle():
    rng = np.random.default_rng(0)
    x, labels = rng.standard_normal((3, CLASSES, 5)).astype("float32"), rng.integers(0, CLASSES, (3, 5))
    loss, gradient = value_and_gradient(lambda x: kernels.sparse_softmax_cross_entropy(labels, x, axis=1), tensor(x))
    expected = closed_form(np.moveaxis(x, 1, 2).reshape(-1, CLASSES), labels.reshape(-1))
    np.testing.assert_allclose(loss, expected[0].reshape(3, 5), rtol=2e-6)
    np.testing.assert_allclose(gradient, np.moveaxis(expected[1].reshape(3, 5, CLASSES), 2, 1), atol=1e-6)


def test_second_derivatives_see_nothing_of_added_rows():
    x, labels = data(3)
    v = np.random.default_rng(1).standard_normal(x.shape).astype("float32")
    product = hessian_vector_product(
        lambda x: kernels.sparse_softmax_cross_entropy(labels, x), tensor(x), tensor(v), 1.0
    )
    p = closed_form(x, labels)[1] + np.eye(CLASSES)[labels]
    np.testing.assert_allclose(product, p * (v - (p * v).sum(axis=1, keepdims=True)), atol=1e-6)


def test_checks_see_the_rows_that_were_given():
    x, labels = data(3)
    labels[2] = CLASSES
    with pytest.raises(ValueError, match=r"label 7 at position \(2,\), and 1 such label"):
        kernels.sparse_softmax_cross_entropy(labels, x)
    ranks = sparse_softmax.label_ranks(labels, x)
    assert ranks.shape == (3,) and np.isnan(to_numpy(ranks)[2])


def count_traces(monkeypatch):
    """How often kernels are traced from here on, each time to compile a program."""
    from keras_xent.kernels import _compiled

    traces, jit = [], _compiled._backend.jit
    _compiled.clear_cache()

    def counting(function):
        def run(*tensors):
            traces.append(1)
            return function(*tensors)

        return jit(run)

    monkeypatch.setattr(_compiled._backend, "jit", counting)
    return traces


@pytest.mark.whole
def test_sixty_lengths_take_few_programs_in_eager_mode(monkeypatch):
    traces = count_traces(monkeypatch)
    for length in range(5, 65):
        x, labels = data(8 * length)
        value_and_gradient(lambda x, y=labels: LOSSES["sparse"](y, x), tensor(x))
    assert len(traces) == 2  # forward and backward


if BACKEND == "tensorflow":
    import tensorflow as tf

    import keras_xent as kx

    def loss_and_gradient(loss, logits, labels, **options):
        @tf.function(autograph=False, input_signature=[logits, labels], **options)
        def run(x, y):
            with tf.GradientTape() as tape:
                tape.watch(x)
                value = loss(y, x)
            return value, tape.gradient(value, x)

        return run

    ROWS = tf.TensorSpec([None, CLASSES]), tf.TensorSpec([None], "int32")

    def test_a_graph_for_any_number_of_rows_takes_a_program_for_each_bucket(monkeypatch):
        traces = count_traces(monkeypatch)
        run = loss_and_gradient(LOSSES["sparse"], *ROWS)
        for rows in (0, 1, 40, 512, 513, 640):
            x, labels = data(rows)
            loss, gradient = run(x, labels)
            expected = closed_form(x, labels)
            np.testing.assert_allclose(loss, expected[0], rtol=2e-6, atol=1e-6)
            np.testing.assert_allclose(gradient, expected[1], atol=1e-6)
        # One trace serves all sizes; XLA compiles it for 512 and for 640 rows.
        assert len(traces) == 2
        bad = data(9)[1]
        bad[4] = -3
        with pytest.raises(tf.errors.InvalidArgumentError, match="classes from 0"):
            run(data(9)[0], bad)

    @pytest.mark.parametrize(
        "loss,labels",
        [
            (kx.losses.SparseCategoricalCrossentropy, ROWS[1]),
            (kx.losses.CategoricalCrossentropy, ROWS[0]),
            (kx.losses.BinaryCrossentropy, ROWS[0]),
        ],
    )
    def test_the_graph_of_a_loss_and_its_gradient_is_small(loss, labels, monkeypatch):
        # A metric of another test that is still alive would have the ranks of labels computed.
        internals.without_metrics(monkeypatch)
        run = loss_and_gradient(loss(from_logits=True), ROWS[0], labels)
        assert len(run.get_concrete_function().graph.get_operations()) <= 120

    def test_nothing_is_added_inside_a_program_of_xla_nor_to_a_known_number_of_rows():
        def padded(run):
            return any("Pad" in op.type for op in run.get_concrete_function().graph.get_operations())

        assert padded(loss_and_gradient(LOSSES["sparse"], *ROWS))
        assert not padded(loss_and_gradient(LOSSES["sparse"], *ROWS, jit_compile=True))
        static = tf.TensorSpec([9, CLASSES]), tf.TensorSpec([9], "int32")
        assert not padded(loss_and_gradient(LOSSES["sparse"], *static))

else:
    import jax

    def test_nothing_is_added_inside_a_program():
        x, labels = data(9)
        text = jax.jit(lambda x: LOSSES["sparse"](labels, x)).lower(x).as_text()
        assert "512" not in text
