"""Losses inside conditions, other programs and other ways to run one."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_xent as kx
from tests.backend import BACKEND, MODES, tensor, to_numpy, value_and_gradient
from tests.tiers import fast_for, whole

LOSSES = {
    "sparse": (kx.losses.SparseCategoricalCrossentropy(from_logits=True), np.arange(4)),
    "tokens": (kx.losses.MaskedSequenceCrossentropy(label_smoothing=0.1), np.arange(4)),
    "categorical": (kx.losses.CategoricalCrossentropy(from_logits=True), np.eye(4, dtype="float32")),
    "binary": (kx.losses.BinaryCrossentropy(from_logits=True), np.eye(4, dtype="float32")),
    "probabilities": (kx.losses.BinaryCrossentropy(), np.eye(4, dtype="float32")),
}


@fast_for("tokens-xla", "binary-graph", "tokens-jit")
@pytest.mark.parametrize("mode", [m for m in MODES if m != "eager"])
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_inside_a_condition_has_its_gradient_outside(name, mode):
    loss, y = LOSSES[name]
    x = tensor(np.random.default_rng(0).uniform(0.1, 0.9, (4, 4)), "float32")
    y = ops.convert_to_tensor(y)
    expected = value_and_gradient(lambda x: loss(y, x), x)
    # What is differentiated was computed inside the condition too.
    no_loss, of_rows = lambda x: 0.0 * ops.sum(x), lambda x: loss(y, ops.reshape(x, (4, 4)))
    conditions = [
        lambda x: ops.cond(ops.max(x) > 0, lambda: of_rows(x), lambda: no_loss(x)),
        lambda x: ops.switch(ops.cast(ops.max(x) > 0, "int32"), [no_loss, of_rows], x),
    ]
    for condition in conditions:
        for got, right in zip(value_and_gradient(condition, x, mode=mode), expected, strict=True):
            np.testing.assert_allclose(got, right, rtol=2e-6, atol=1e-8)


@pytest.mark.parametrize("name", LOSSES)
def test_labels_weights_and_predictions_may_be_variables(name):
    loss, y = LOSSES[name]
    x, w = np.random.default_rng(0).uniform(0.1, 0.9, (4, 4)).astype("float32"), np.array([1, 2, 0, 1], "float32")
    variables = [keras.Variable(a, dtype=str(a.dtype), trainable=False) for a in (y, x, w)]
    np.testing.assert_allclose(float(loss(*variables)), float(loss(y, x, w)), rtol=1e-6)


def test_class_weights_of_a_kernel_may_be_a_variable():
    loss, y = kx.kernels.sparse_softmax_cross_entropy, np.arange(4)
    x, w = np.random.default_rng(0).normal(size=(4, 4)).astype("float32"), np.array([1, 2, 0, 1], "float32")
    expected = to_numpy(loss(y, x)) * w
    np.testing.assert_allclose(to_numpy(loss(y, x, class_weight=keras.Variable(w))), expected, rtol=1e-6)


def test_a_loss_inside_a_condition_of_fit():
    loss = LOSSES["sparse"][0]
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(4, kernel_initializer="zeros")])
    model.compile("sgd", lambda y, p: ops.cond(ops.size(y) > 0, lambda: loss(y, p), lambda: 0.0 * ops.sum(p)))
    np.testing.assert_allclose(
        model.fit(np.ones((4, 4)), np.arange(4), verbose=0).history["loss"], np.log(4), rtol=1e-6
    )


@fast_for("99-*")
@pytest.mark.parametrize("eager", [False, True], ids=["graph", "eager"])
@pytest.mark.parametrize("bad", [-1, 99])
def test_a_fused_head_looks_at_weights_before_labels(bad, eager):
    x, y, w = np.array([[1, 2, 3, 0]]), np.array([[2, 3, bad, bad]]), np.array([[1.0, 1.0, 0.0, 0.0]])
    values = []
    for fuse in (False, True):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((4,)), keras.layers.Embedding(5, 8), keras.layers.Dense(5)])
        if fuse:
            kx.fuse_head(model)
        model.compile("sgd", kx.losses.MaskedSequenceCrossentropy(), run_eagerly=eager)
        values.append(model.fit(x, y, sample_weight=w, verbose=0).history["loss"][0])
    np.testing.assert_allclose(values[1], values[0], rtol=1e-6)


@pytest.mark.parametrize("ending", ["keras", "h5"])
@pytest.mark.parametrize(
    "function",
    [
        kx.kernels.sigmoid_cross_entropy,
        kx.kernels.sparse_softmax_cross_entropy,
        kx.losses.sparse_categorical_crossentropy,
    ],
    ids=lambda function: function.__name__,
)
def test_a_model_compiled_with_a_function_is_loaded_with_it(function, ending, tmp_path):
    x, y = np.ones((4, 3)), np.zeros((4, 2)) if "sigmoid" in function.__name__ else np.zeros(4, int)
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, activation="sigmoid")])
    model.compile("sgd", function)
    expected = model.evaluate(x, y, verbose=0)
    model.save(tmp_path / f"model.{ending}")
    loaded = keras.models.load_model(tmp_path / f"model.{ending}")
    assert loaded.loss is function
    np.testing.assert_allclose(loaded.evaluate(x, y, verbose=0), expected, rtol=1e-6)


def test_a_way_out_of_xla():
    loss, y = LOSSES["sparse"]
    x = np.random.default_rng(0).normal(size=(4, 4)).astype("float32")
    expected = float(loss(y, x))
    assert kx.config.uses_xla()
    kx.config.use_xla(False)
    try:
        assert not kx.config.uses_xla()
        np.testing.assert_allclose(float(loss(y, x)), expected, rtol=1e-6)
        if BACKEND == "tensorflow":
            import tensorflow as tf

            names = {
                op.type for op in tf.function(lambda x: loss(y, x)).get_concrete_function(x).graph.get_operations()
            }
            assert not any("PartitionedCall" in name for name in names)
    finally:
        kx.config.use_xla(True)
    np.testing.assert_allclose(float(loss(y, x)), expected, rtol=1e-6)


if BACKEND == "tensorflow":

    def test_boolean_mask_before_a_loss_under_xla():
        import tensorflow as tf

        for loss in (kx.losses.SparseCategoricalCrossentropy(from_logits=True), kx.losses.MaskedSequenceCrossentropy()):

            @tf.function(jit_compile=True)
            def of_known(x, y):
                return loss(tf.boolean_mask(y, y >= 0), tf.boolean_mask(x, y >= 0))  # noqa: B023

            value = of_known(tf.zeros((4, 3)), tf.constant([0, 1, -1, 2]))
            np.testing.assert_allclose(to_numpy(value), np.log(3), rtol=1e-6)

    @fast_for("binary")
    @pytest.mark.parametrize("name", ["sparse", "binary"])
    def test_the_error_of_a_step_begins_with_the_sentence(name):
        import tensorflow as tf

        loss, y = LOSSES[name]
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(4)])
        model.compile("sgd", loss)
        with pytest.raises(tf.errors.InvalidArgumentError) as error:
            model.fit(np.ones((4, 4)), y - 1, verbose=0)
        first, sentence = str(error.value)[:300], "y_true must be " + ("classes" if name == "sparse" else "numbers")
        assert sentence.replace(" ", "_") in first and sentence.replace("y_true", "`y_true`") in str(error.value)

    @fast_for("tokens", "binary")
    @pytest.mark.parametrize("name", LOSSES)
    def test_labels_of_an_unknown_number_of_dimensions_are_told(name):
        import tensorflow as tf

        loss, y = LOSSES[name]
        step = tf.function(lambda y: loss(y, tf.zeros((4, 4))), input_signature=[tf.TensorSpec(None, y.dtype)])
        with pytest.raises(ValueError, match="number of dimensions is not known. Give it a shape where it is made"):
            step(y)

    def test_numbers_can_be_checked():
        import tensorflow as tf

        loss, y = LOSSES["sparse"]
        tf.debugging.enable_check_numerics()
        try:
            # XLA refuses the operations that check, and is not used.
            assert not kx.config.uses_xla()
            for head in (keras.layers.Dense, kx.layers.LogitsDense):
                model = keras.Sequential([keras.Input((4,)), head(4, kernel_initializer="zeros")])
                model.compile("sgd", loss, metrics=[kx.metrics.Perplexity()])
                value = model.fit(np.ones((4, 4)), y, verbose=0).history["loss"][0]
        finally:
            tf.debugging.disable_check_numerics()
        np.testing.assert_allclose(value, np.log(4), rtol=1e-6)
        assert kx.config.uses_xla()

    def hessian_vector_product(function, x, v):
        import tensorflow as tf

        with tf.GradientTape() as outer:
            outer.watch(x)
            with tf.GradientTape() as inner:
                inner.watch(x)
                value = function(x)
            product = tf.reduce_sum(inner.gradient(value, x) * v)
        return outer.gradient(product, x)

    def of_softmax(x, v):
        """The product of `v` and the Hessian of the mean cross-entropy of the rows."""
        p = np.exp(x) / np.exp(x).sum(1, keepdims=True)
        return p * (v - (p * v).sum(1, keepdims=True)) / len(x)

    def of_sigmoid(x, v):
        """The same of the mean binary cross-entropy."""
        p = 1 / (1 + np.exp(-x))
        return p * (1 - p) * v / x.size

    HESSIANS = {"sparse": of_softmax, "categorical": of_softmax, "binary": of_sigmoid}

    def in_condition(loss, x):
        import tensorflow as tf

        return tf.cond(tf.reduce_sum(x) > -1e9, lambda: loss(x), lambda: 0.0 * tf.reduce_sum(x))

    def in_loop(loss, x):
        import tensorflow as tf

        more = lambda i, total: (i + 1, total + loss(x) / 2)  # noqa: E731
        return tf.while_loop(lambda i, _: i < 2, more, (0, 0.0), maximum_iterations=2)[1]

    @fast_for("sparse-condition-xla", "sparse-loop-xla")
    @pytest.mark.parametrize(
        "inside, jit_compile",
        [(in_condition, None), (in_condition, True), (in_loop, None), (in_loop, True)],
        ids=["condition-graph", "condition-xla", "loop-graph", "loop-xla"],
    )
    @pytest.mark.parametrize("name", HESSIANS)
    def test_second_derivatives_pass_a_condition_and_a_loop(name, inside, jit_compile):
        import tensorflow as tf

        loss, y = LOSSES[name]
        x, v = np.random.default_rng(0).normal(size=(2, 4, 4)).astype("float32")
        y = tf.constant(y)

        @tf.function(jit_compile=jit_compile, autograph=False)
        def product(x, v):
            return hessian_vector_product(lambda x: inside(lambda x: loss(y, x), x), x, v)

        right = HESSIANS[name](x.astype("float64"), v)
        np.testing.assert_allclose(product(tf.constant(x), tf.constant(v)), right, rtol=1e-6, atol=1e-7)

    @fast_for("sparse")
    @pytest.mark.parametrize("name", HESSIANS)
    def test_functions_that_run_eagerly_have_both_derivatives(name):
        import tensorflow as tf

        loss, y = LOSSES[name]
        x, v = np.random.default_rng(0).normal(size=(2, 4, 4)).astype("float32")
        expected = value_and_gradient(lambda x: loss(y, x), tensor(x))
        tf.config.run_functions_eagerly(True)
        try:
            got = value_and_gradient(lambda x: loss(y, x), tensor(x))
            product = hessian_vector_product(lambda x: loss(y, x), tf.constant(x), tf.constant(v))
        finally:
            tf.config.run_functions_eagerly(False)
        for one, other in zip(got, expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(product, HESSIANS[name](x.astype("float64"), v), rtol=1e-6, atol=1e-7)

else:

    def test_nan_is_looked_for_without_false_alarm():
        import jax

        y, x = np.array([1, -1, 2]), np.zeros((3, 4), "float32")
        jax.config.update("jax_debug_nans", True)
        try:
            for loss in (
                kx.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=-1),
                kx.losses.MaskedSequenceCrossentropy(ignore_class=-1, label_smoothing=0.1),
            ):
                value, _ = value_and_gradient(lambda x: loss(y, x), tensor(x))  # noqa: B023
                assert np.isfinite(value)
        finally:
            jax.config.update("jax_debug_nans", False)

    @whole
    def test_a_mesh_of_explicit_axes():
        import subprocess
        import sys

        from tests.backend import environment

        program = """
import jax, numpy as np, keras_xent as kx
from jax.sharding import NamedSharding, PartitionSpec
sharding = NamedSharding(jax.make_mesh((4,), ("data",)), PartitionSpec("data"))
x, y = jax.device_put(np.zeros((8, 7), "float32"), sharding), jax.device_put(np.arange(8) % 7, sharding)
q = jax.device_put(np.eye(8, 7, dtype="float32"), sharding)
losses = (
    (kx.losses.SparseCategoricalCrossentropy(from_logits=True), y, 7),
    (kx.losses.MaskedSequenceCrossentropy(label_smoothing=0.1), y, 7),
    (kx.losses.CategoricalCrossentropy(from_logits=True, reduction="token_mean"), q, 7),
    (kx.losses.BinaryCrossentropy(from_logits=True), q, 2),
)
for loss, y, classes in losses:
    value, gradient = jax.jit(jax.value_and_grad(lambda x: loss(y, x)))(x)
    assert abs(float(value) - np.log(classes)) < 1e-5 and np.isfinite(np.asarray(gradient)).all()

mesh = jax.make_mesh((2, 2), ("data", "model"))
rng = np.random.default_rng(0)
hidden, other = rng.normal(size=(2, 8, 4)).astype("float32")
kernel, logits, labels = rng.normal(size=(4, 6)).astype("float32"), hidden @ rng.normal(size=(4, 6)), np.arange(8) % 6
logits = logits.astype("float32")
steps = (
    lambda h, k, x, y: kx.kernels.linear_cross_entropy(h, k, y, reduction="token_mean"),
    lambda h, k, x, y: kx.kernels.linear_distillation(h, k, other, kernel, token_weights=y, reduction="token_mean"),
    lambda h, k, x, y: kx.kernels.linear_token_statistics(h, k, y).entropy.sum(),
    lambda h, k, x, y: kx.losses.Distillation()(x, h @ k),
    lambda h, k, x, y: kx.losses.MaskedSequenceCrossentropy(class_weight=[1, 2, 3, 4, 5, 6])(y, x + h @ k, y),
)
# Teacher and labels on all devices, the kernel divided along its classes.
specs = PartitionSpec("data"), PartitionSpec(None, "model"), PartitionSpec(), PartitionSpec()
arrays = hidden, kernel, logits, labels
sharded = [jax.device_put(a, NamedSharding(mesh, spec)) for a, spec in zip(arrays, specs)]
for step in steps:
    expected = jax.value_and_grad(step, (0, 1))(*arrays)
    with jax.set_mesh(mesh):
        found = jax.jit(jax.value_and_grad(step, (0, 1)))(*sharded)
    assert [g.sharding.spec[:1] for g in found[1]] == [a.sharding.spec[:1] for a in sharded[:2]]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), found, expected)
print("right")
"""
        flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
        child = subprocess.run(
            [sys.executable, "-c", program], env=environment(**flags), capture_output=True, text=True
        )
        assert child.stdout.strip() == "right", child.stderr[-2000:]


@fast_for("sparse")
@pytest.mark.skipif(BACKEND != "jax", reason="jax.export")
@pytest.mark.parametrize("name", ["sparse", "categorical", "binary"])
def test_a_loss_is_exported_for_any_number_of_rows(name):
    import jax
    from jax import export

    loss, y = LOSSES[name]
    y, x = np.resize(y, (200, *y.shape[1:])), np.random.default_rng(0).normal(size=(200, 4)).astype("float32")
    y = y.astype("int32" if name == "sparse" else "float32")
    (rows,) = export.symbolic_shape("rows")
    shapes = [jax.ShapeDtypeStruct((rows, *a.shape[1:]), a.dtype) for a in (y, x)]
    step = jax.value_and_grad(lambda x, y: loss(y, x))
    exported = export.export(jax.jit(lambda y, x: step(x, y)))(*shapes)
    for number in (3, 200):
        found, expected = exported.call(y[:number], x[:number]), step(x[:number], y[:number])
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=2e-6, atol=1e-8)


@pytest.mark.whole
@pytest.mark.skipif(BACKEND != "jax", reason="jax.export")
def test_a_head_is_exported_for_any_number_of_tokens():
    import jax
    from jax import export

    rng = np.random.default_rng(0)
    hidden, kernel = rng.normal(size=(600, 4)).astype("float32"), rng.normal(size=(4, 7)).astype("float32")
    labels = rng.integers(0, 7, 600, dtype="int32")

    def step(hidden, labels):
        return jax.value_and_grad(
            lambda h: kx.kernels.linear_cross_entropy(h, kernel, labels, ignore_class=0, reduction="token_mean")
        )(hidden)

    (tokens,) = export.symbolic_shape("tokens")
    shapes = [jax.ShapeDtypeStruct((tokens, *a.shape[1:]), a.dtype) for a in (hidden, labels)]
    exported = export.export(jax.jit(step))(*shapes)
    for number in (3, 600):
        found, expected = exported.call(hidden[:number], labels[:number]), step(hidden[:number], labels[:number])
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=2e-6, atol=1e-8)
