"""Values that were silently wrong: labels out of range, overflow, activations over another axis."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_xent as kx
from tests.backend import BACKEND, MODES, tensor, to_numpy, value_and_gradient
from tests.tiers import fast_for, sample, whole

Binary = kx.losses.BinaryCrossentropy
in_one_program = pytest.mark.parametrize("mode", ["xla" if BACKEND == "tensorflow" else "jit"])
every_mode = pytest.mark.parametrize("mode", MODES)


@fast_for("3-nan-*")
@in_one_program
@pytest.mark.parametrize("bad", [-1, 2, 255, np.nan])
@pytest.mark.parametrize("labels", [1, 3])
def test_a_binary_label_out_of_range_makes_its_row_nan(labels, bad, mode):
    y = np.ones((4, labels), "float32" if bad != bad else "int32")
    y[1, 0] = bad
    x = np.linspace(-1, 1, 4 * labels).reshape(4, labels).astype("float32")
    loss = Binary(from_logits=True, reduction=None)
    value, gradient = value_and_gradient(lambda x: loss(tensor(y), x), tensor(x), mode=mode)
    assert np.isnan(value).tolist() == [False, True, False, False]
    assert np.isnan(gradient).all(1).tolist() == [False, True, False, False]
    assert np.isfinite(gradient[[0, 2, 3]]).all()
    # Under weight 0, and as a missing label, it leaves no trace.
    weights = np.array([1, 0, 1, 1], "float32")
    mean = Binary(from_logits=True)
    value, gradient = value_and_gradient(lambda x: mean(tensor(y), x, weights), tensor(x), mode=mode)
    assert np.isfinite(value) and np.isfinite(gradient).all() and not gradient[1].any()
    known = Binary(from_logits=True, ignore_class=bad)
    value, gradient = value_and_gradient(lambda x: known(tensor(y), x), tensor(x), mode=mode)
    assert np.isfinite(value) and np.isfinite(gradient).all() and gradient[1, 0] == 0


def test_binary_labels_of_minus_1_do_not_train_silently():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(64, 8)).astype("float32"), np.where(rng.random(64) > 0.5, 1, -1)
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(1)])
    model.compile("sgd", Binary(from_logits=True), jit_compile=True)
    assert np.isnan(model.fit(x, y, verbose=0).history["loss"][0])


@every_mode
def test_noisy_labels_of_adversarial_networks_train_on_every_path(mode):
    """`1 + 0.05 u`, as in Keras' DCGAN example, and labels from 0.7 to 1.2."""
    y, x = np.array([[1.05], [1.2], [-0.05], [0.3]], "float32"), np.array([[0.5], [-1], [2], [0]], "float32")
    expected = np.log1p(np.exp(-np.abs(x))) + np.maximum(x, 0) - x * y
    got = MODES[mode](Binary(from_logits=True, reduction="none"))(tensor(y), tensor(x))
    np.testing.assert_allclose(to_numpy(got), expected[:, 0], rtol=2e-6)


@pytest.mark.parametrize("mode", sample([{}, {"jit_compile": True}], [{}]), ids=["auto", "xla"])
def test_a_loss_scale_sees_the_overflow_of_a_gradient(mode):
    keras.config.set_dtype_policy("mixed_float16")
    try:
        bias = keras.initializers.Constant(-8.0)
        head = keras.layers.Dense(1, "sigmoid", bias_initializer=bias)
        model = keras.Sequential([keras.Input((1,)), head, keras.layers.Reshape((1,))])
        model.compile(keras.optimizers.SGD(0.5), Binary(), **mode)
        for _ in range(60):
            loss = model.train_on_batch(np.zeros((32, 1), "float32"), np.ones((32, 1), "float32"))
    finally:
        keras.config.set_dtype_policy("float32")
    assert float(loss) < 0.1


@fast_for("categorical-xla", "categorical-jit")
@every_mode
@pytest.mark.parametrize("loss", [Binary, kx.losses.CategoricalCrossentropy], ids=["binary", "categorical"])
def test_an_overflow_of_a_scaled_loss_is_infinite_and_of_a_plain_one_the_largest_number(loss, mode):
    y, p = np.array([[1.0, 0.0]], "float32"), tensor([[1e-6, 0.5]], "float16")
    for upstream, expected in (1.0, -65504.0), (1024.0, -np.inf):
        run = loss(reduction="none")
        _, gradient = value_and_gradient(lambda p: run(y, p), p, np.array([upstream], "float32"), mode)  # noqa: B023
        assert gradient[0, 0] == expected and np.isfinite(gradient[0, 1])


@whole
@pytest.mark.parametrize("mode", [{"run_eagerly": True}, {}, {"jit_compile": True}], ids=["eager", "auto", "xla"])
def test_a_softmax_over_another_axis_counts_as_probabilities(mode):
    z, y = np.array([[[2.0], [0.0], [0.0]]], "float32"), np.array([[[1.0], [0.0], [0.0]]], "float32")
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    binary = -(y * np.log(p) + (1 - y) * np.log1p(-p)).mean()
    model = keras.Sequential([keras.Input((3, 1)), keras.layers.Softmax(axis=1)])
    model.compile("sgd", Binary(), **mode)
    np.testing.assert_allclose(model.evaluate(z, y, verbose=0), binary, rtol=1e-6)
    # Over the class axis of the loss it is that loss's softmax, wherever that axis is.
    model.compile("sgd", kx.losses.CategoricalCrossentropy(axis=1), **mode)
    np.testing.assert_allclose(model.evaluate(z, y, verbose=0), -np.log(p[0, 0, 0]), rtol=1e-6)
    z, y = np.array([[[2.0, 1.0], [0.0, 3.0]]], "float32"), np.array([[0, 1]])
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    q = p / p.sum(-1, keepdims=True)
    model = keras.Sequential([keras.Input((2, 2)), keras.layers.Softmax(axis=1)])
    model.compile("sgd", kx.losses.SparseCategoricalCrossentropy(), **mode)
    right = -np.log([q[0, 0, 0], q[0, 1, 1]]).mean()
    np.testing.assert_allclose(model.evaluate(z, y, verbose=0), right, rtol=1e-6)


@pytest.mark.parametrize("make", [lambda: keras.Variable(0.1), lambda: keras.Variable([0.1, 0.2])], ids=["[]", "[2]"])
def test_an_argument_that_is_a_variable_is_refused(make):
    losses, kernels = kx.losses, kx.kernels
    one = np.ones((1, 1), "float32")
    for build in (
        lambda v: losses.SparseCategoricalCrossentropy(label_smoothing=v),
        lambda v: losses.CategoricalCrossentropy(focal_gamma=v),
        lambda v: losses.MaskedSequenceCrossentropy(class_weight=[v, 1.0]),
        lambda v: losses.MaskedSequenceCrossentropy(normalizer=v),
        lambda v: losses.Distillation(temperature=v),
        lambda v: kernels.linear_token_statistics(one, one, [0], temperature=v),
        lambda v: kx.preference.dpo(one, one, one, one, beta=v),
    ):
        with pytest.raises(ValueError, match=r"known when the loss is made. Received: (Variable|Traced)"):
            build(make())


LOW_RANK = {
    "labels": lambda h, k, low, **m: kx.kernels.linear_cross_entropy(h, k, [1, 0, 1], low_rank=low, **m),
    "targets": lambda h, k, low, **m: kx.kernels.linear_softmax_cross_entropy(
        h, k, np.eye(2, dtype="float32")[[1, 0, 1]], low_rank=low, **m
    ),
    "statistics": lambda h, k, low, **m: (
        kx.kernels.linear_token_statistics(h, k, [1, 0, 1], low_rank=low, mask=np.array([True, False, True])).log_prob
    ),
    "distillation": lambda h, k, low, **m: kx.kernels.linear_distillation(h, k, h[:, :1] * 0, k[:1], low_rank=low, **m),
}


@fast_for("mask-labels", "token_weights-distillation")
@pytest.mark.parametrize("kind", LOW_RANK)
@pytest.mark.parametrize("given", ["mask", "token_weights"])
def test_what_lies_under_a_mask_does_not_reach_low_rank_factors(kind, given):
    hidden = np.array([[0.5, -1.0, 2.0], [np.nan, np.inf, 1.0], [1.0, 0.0, -1.0]], "float32")
    kernel = tensor(np.arange(6.0).reshape(3, 2) / 6, "float32")
    first, second = np.array([[1.0], [0.5], [-1.0]], "float32"), np.array([[0.2, -0.4]], "float32")
    found = []
    for rows in (hidden, np.nan_to_num(hidden, nan=0, posinf=0)):
        option = {given: np.array([1, 0, 1], "bool" if given == "mask" else "float32")}
        rows = tensor(rows, "float32")
        found.append(
            value_and_gradient(lambda a: LOW_RANK[kind](rows, kernel, (a, second), **option), tensor(first))[1]  # noqa: B023
        )
    assert np.abs(found[1]).max() > 0.01
    np.testing.assert_allclose(*found, rtol=1e-6)


@fast_for("xla", "jit")
@every_mode
def test_labels_that_a_program_closes_over(mode):
    real, x = np.ones((4, 1), "float32"), tensor([[0.3], [1.0], [-2.0], [0.0]], "float32")
    real = ops.convert_to_tensor(real)
    loss = Binary(from_logits=True)
    value, _ = value_and_gradient(lambda x: loss(real, x), x, mode=mode)
    np.testing.assert_allclose(value, 0.921923, rtol=1e-6)
    metric, labels = kx.losses.SparseCategoricalCrossentropy(), ops.convert_to_tensor(np.array([0, 1]))
    p = ops.convert_to_tensor(np.array([[0.5, 0.5], [0.75, 0.25]], "float32"))
    # Predictions and weights too.
    weights = ops.convert_to_tensor(np.array([1.0, 2.0], "float32"))
    got = MODES[mode](lambda y: metric(y, p, weights))(labels)
    np.testing.assert_allclose(to_numpy(got), -(np.log(0.5) + 2 * np.log(0.25)) / 2, rtol=1e-6)


def test_numbers_of_python_in_an_array_are_labels():
    x = np.random.default_rng(0).normal(size=(3, 4)).astype("float32")
    loss = kx.losses.SparseCategoricalCrossentropy(from_logits=True)
    assert float(loss(np.array([0, 3, 1], object), x)) == float(loss(np.array([0, 3, 1]), x))
    with pytest.raises(ValueError, match="Received: dtype object. Turn names into integers first"):
        loss(np.array([0, "cat", 1], object), x)


def test_an_ignored_label_may_be_larger_than_an_int32():
    x = np.zeros((2, 4), "float32")
    loss = kx.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=2**32 - 1)
    np.testing.assert_allclose(float(loss(np.array([1, 2**32 - 1], "uint32"), x)), np.log(4), rtol=2e-7)
    np.testing.assert_allclose(float(loss(np.array([1, 2]), x)), np.log(4), rtol=2e-7)


# JAX makes uint32 of the arguments of a program.
UNSIGNED = [("uint32", 2**32 - 1, "program"), ("uint32", 2**31 + 2, "program"), ("uint64", 2**63 + 2, "eager")]


@pytest.mark.parametrize("dtype, label, mode", [*UNSIGNED, ("uint32", 2**31 + 2, "eager")])
def test_unsigned_labels_that_no_signed_integer_holds(dtype, label, mode):
    mode = {"program": "xla" if BACKEND == "tensorflow" else "jit"}.get(mode, mode)
    y, x = np.array([label, 3, 2], dtype), np.zeros((3, 4), "float32")
    # 2 and 3 are what wraps around would be mistaken for.
    for ignored, expected in ((label, [0, 1, 1]), (-1, [np.nan, 1, 1]), (3, [np.nan, 0, 1])):
        loss = kx.losses.SparseCategoricalCrossentropy(from_logits=True, reduction=None, ignore_class=ignored)
        if mode == "eager" and np.isnan(expected[0]):
            with pytest.raises(ValueError, match="classes from 0 to 3"):
                loss(y, x)
        else:
            found = MODES[mode](loss)(ops.convert_to_tensor(y) if mode != "eager" else y, tensor(x))
            np.testing.assert_allclose(to_numpy(found), np.multiply(expected, np.log(4)), rtol=1e-6)


def test_predictions_without_a_class_axis_are_refused():
    loss = kx.losses.SparseCategoricalCrossentropy(from_logits=True)
    with pytest.raises(ValueError, match="`y_pred` has one number for each example, and a distribution has a class"):
        loss(np.array([0, 1]), np.zeros(2, "float32"))
    with pytest.raises(ValueError, match="`y_pred` must have a class axis: shape"):
        loss(np.array(0), np.float32(1))
    with pytest.raises(ValueError, match="`class_weight` must be None, a list with one number for each class, or a"):
        kx.losses.SparseCategoricalCrossentropy(class_weight={"cat": 1.0})
