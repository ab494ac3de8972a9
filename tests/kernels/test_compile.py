"""What the compiled programs hold in memory, where they can run, and how often they are compiled."""

import dataclasses
import functools
import math
import re

import ml_dtypes
import numpy as np
import pytest
from keras import ops

from keras_xent import kernels, losses
from tests import internals
from tests.backend import BACKEND, optimized_hlo, tensor, to_numpy, value_and_gradient
from tests.tiers import fast_for, sample

if BACKEND == "jax":
    import jax
    from jax import export
else:
    import tensorflow as tf

# No two sizes are alike, so that a buffer of logits' size can be told by its shape.
ROWS, CLASSES = 4111, 4099
SOFTMAX = internals.SoftmaxOptions(z_loss=1e-3)
SIGMOID = {"options": internals.SigmoidOptions(label_smoothing=0.1, ignore_class="nan", mean_over_labels=True)}


def example(dtype="float32"):
    rng = np.random.default_rng(0)
    logits = tensor(rng.standard_normal((ROWS, CLASSES)), dtype)
    labels = tensor(rng.integers(0, CLASSES, (ROWS, 1)).astype("int32"))
    targets = tensor(rng.dirichlet(np.ones(CLASSES), ROWS), dtype)
    weights = tensor(rng.uniform(0, 1, (1, CLASSES)), "float32")
    return logits, labels, targets, weights


def programs(logits, labels, targets, weights):
    """Every compiled program: name, function, arguments, options, and how many arrays of logits' size it returns."""
    one = ops.ones((ROWS, 1), "float32")
    saved, dense_saved = (one, one), (one, one, one, one)
    for smoothing in (0.0, 0.1):
        options = {"options": dataclasses.replace(SOFTMAX, label_smoothing=smoothing)}
        name = "smoothed" if smoothing else "plain"
        yield f"sparse forward {name}", internals.sparse_forward, (logits, labels), options, 0
        yield f"sparse forward weighted {name}", internals.sparse_forward, (logits, labels, weights), options, 0
        yield f"sparse backward {name}", internals.sparse_backward, (one, saved, logits, labels), options, 1
        yield f"dense forward {name}", internals.dense_forward, (logits, targets), options, 0
        yield f"dense backward {name}", internals.dense_backward, (one, dense_saved, logits, targets), options, 1
    weight = ops.ones((1, 1), "float32")
    yield "sigmoid forward", internals.sigmoid_forward, (logits, targets, weight), SIGMOID, 0
    yield "sigmoid backward", internals.sigmoid_backward, (one, (one,), logits, targets, weight), SIGMOID, 1


NAMES = [program[0] for program in programs(*[None] * 4)]


@fast_for("sparse backward*")
@pytest.mark.parametrize(
    "name, dtype",
    sample(
        [(name, dtype) for name in NAMES for dtype in ("float32", "bfloat16")],
        [(name, "float32") for name in NAMES if "weighted" not in name and "plain" not in name],
    ),
)
def test_the_gradient_is_the_only_buffer_of_the_size_of_the_logits(name, dtype):
    _, function, inputs, options, outputs = next(p for p in programs(*example(dtype)) if p[0] == name)
    size = ROWS * CLASSES * (4 if dtype == "float32" else 2)
    if BACKEND == "jax":
        analysis = jax.jit(functools.partial(function.__call__, **options)).lower(*inputs).compile().memory_analysis()
        assert analysis.output_size_in_bytes < (outputs + 0.1) * size
        # XLA:CPU takes 16-bit logits and targets for integers by a copy; what is computed from them is not kept.
        copies = sum(i.shape == inputs[0].shape for i in inputs) if dtype == "bfloat16" and outputs == 0 else 0
        assert analysis.temp_size_in_bytes < (copies + 0.3) * size
    else:
        program, arguments = function.lower(*inputs, **options)
        text = program.experimental_get_compiler_ir(*arguments)(stage="optimized_hlo")
        assert buffers_of_logits_size(text) == outputs


@pytest.mark.skipif(BACKEND != "jax", reason="TensorFlow's programs are those above")
@pytest.mark.parametrize("name", ["SparseCategoricalCrossentropy", "CategoricalCrossentropy", "BinaryCrossentropy"])
def test_a_compiled_step_keeps_no_second_array_of_many_logits(name):
    shape = (1024, 8192)
    loss = getattr(losses, name)(from_logits=True)
    labels = np.zeros(shape[:1], "int32") if "Sparse" in name else np.zeros(shape, "float32")

    def step(x, labels):
        return jax.value_and_grad(lambda x: loss(labels, x))(x)

    logits = jax.ShapeDtypeStruct(shape, "float32")
    analysis = jax.jit(step).lower(logits, labels).compile().memory_analysis()
    assert analysis.output_size_in_bytes < 1.1 * 4 * math.prod(shape)
    assert analysis.temp_size_in_bytes < 0.3 * 4 * math.prod(shape)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="JAX sums what is in memory")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kernel", ["sparse", "dense"])
def test_the_terms_of_short_rows_are_not_in_memory(kernel, dtype):
    """XLA fuses them into the product with a vector of ones that `row_sum` is, if that is below 16 KB."""
    rows, classes = 8192, 1009
    rng = np.random.default_rng(0)
    x = tensor(rng.standard_normal((rows, classes)), dtype)
    targets = {
        "sparse": tensor(rng.integers(0, classes, (rows, 1)).astype("int32")),
        "dense": tensor(rng.random((rows, classes)), "float32"),
    }[kernel]
    function = internals.sparse_forward if kernel == "sparse" else internals.dense_forward
    program, arguments = function.lower(x, targets, options=internals.SoftmaxOptions(label_smoothing=0.1))
    text = program.experimental_get_compiler_ir(*arguments)(stage="optimized_hlo")
    # The largest of 16-bit floats is found in a copy of them.
    assert buffers_of_logits_size(text, rows * classes) == (dtype == "bfloat16")


def buffers_of_logits_size(text, size=ROWS * CLASSES):
    """How many instructions of the entry computation make an array of at least a quarter of the logits' size.

    Instructions inside a fusion are registers; the entry's instructions are buffers.
    """
    entry = text[text.index("ENTRY ") :]
    found = 0
    for line in entry.splitlines()[1:]:
        match = re.match(r"\s+(?:ROOT )?%?[\w.-]+ = (.+)", line)
        if not match or re.search(r"\b(parameter|get-tuple-element|tuple|bitcast)\(", line):
            continue
        made = re.match(r"\(?[^()]*", match[1])[0].split(" ")[0]
        sizes = [np.prod([int(d) for d in dims.split(",") if d]) for dims in re.findall(r"\w+\[([\d,]*)\]", made)]
        found += any(made >= size / 4 for made in sizes)
    return found


def test_the_count_of_buffers_finds_one_of_the_size_of_the_logits():
    if BACKEND == "tensorflow":
        wasteful = optimized_hlo(lambda x: tf.linalg.matmul(x, tf.exp(x), transpose_b=True), example()[0])
        assert buffers_of_logits_size(wasteful) >= 1
    else:
        compiled = jax.jit(lambda x: (x @ x[:CLASSES].T) @ x[:CLASSES]).lower(example()[0]).compile()
        assert compiled.memory_analysis().temp_size_in_bytes >= ROWS * CLASSES * 4


if BACKEND == "jax":

    @pytest.mark.parametrize("platform", sample(["cpu", "cuda", "tpu"], ["tpu"]))
    def test_every_kernel_lowers_for_every_platform(platform):
        for dtype in ("float32", "bfloat16"):
            for _name, function, inputs, options, _ in programs(*example(dtype)):
                exported = export.export(jax.jit(functools.partial(function, **options)), platforms=[platform])(*inputs)
                assert exported.platforms == (platform,)

    def test_gradients_flow_through_vmap():
        x = np.random.default_rng(0).standard_normal((4, 3, 5)).astype("float32")
        labels = np.zeros((4, 3), int)
        f = jax.grad(lambda x, y: kernels.sparse_softmax_cross_entropy(y, x).sum())
        np.testing.assert_allclose(jax.vmap(f)(x, labels), f(x, labels), rtol=1e-6)

else:

    @fast_for("*-options")
    @pytest.mark.parametrize("options", [{}, {"focal_gamma": 2.0, "label_smoothing": 0.1}], ids=["plain", "options"])
    @pytest.mark.parametrize("name", ["sigmoid", "softmax", "sparse_softmax"])
    def test_no_graph_holds_zeros_of_the_logits_shape(name, options):
        # TensorFlow takes them for constants, which inside `jit_compile=True` lie in memory.
        kernel = getattr(kernels, f"{name}_cross_entropy")
        shape = (7, 4507)

        @tf.function(autograph=False)
        def gradient(logits, labels):
            with tf.GradientTape() as tape:
                tape.watch(logits)
                loss = kernel(labels, logits, **options)
            return tape.gradient(loss, logits)

        labels = tf.TensorSpec(shape[:1], "int32") if name == "sparse_softmax" else tf.TensorSpec(shape)
        graph = gradient.get_concrete_function(tf.TensorSpec(shape), labels).graph.as_graph_def(add_shapes=True)
        made = {
            node.op
            for function in graph.library.function
            for node in function.node_def
            if shape in [tuple(d.size for d in s.dim) for s in node.attr["_output_shapes"].list.shape]
        }
        assert "Exp" in made
        assert made.isdisjoint({"Fill", "Const", "ZerosLike", "OnesLike"})

    def test_one_trace_for_each_bucket_of_rows():
        for rows in (3, 513, 5, 640, 3):
            f = lambda x: kernels.sparse_softmax_cross_entropy(np.zeros(len(x), int), x, z_loss=0.125)  # noqa: E731
            value_and_gradient(f, tf.zeros((rows, 11)))
        options = {"options": internals.SoftmaxOptions(z_loss=0.125)}
        for function, arity in (internals.sparse_forward, 2), (internals.sparse_backward, 4):
            program, _ = function.lower(*[tf.zeros((1, 1))] * arity, **options)
            assert program.experimental_get_tracing_count() == 2

    def of_linear(x, labels, **options):
        return kernels.linear_cross_entropy(x[:, :5], tf.ensure_shape(x[:5, :7], (5, 7)), labels, **options)

    KERNELS = {
        "linear": lambda x, labels: of_linear(x, labels, reduction="mean"),
        "linear, unreduced": lambda x, labels: of_linear(x, labels, mask=labels > 0),
        "sparse": lambda x, labels: kernels.sparse_softmax_cross_entropy(labels, x, label_smoothing=0.1),
        "dense": lambda x, labels: kernels.softmax_cross_entropy(tf.one_hot(labels, 11), x, z_loss=0.1),
        "binary": lambda x, labels: kernels.sigmoid_cross_entropy(tf.one_hot(labels, 11), x, focal_gamma=1.0),
    }

    @fast_for("linear")
    @pytest.mark.parametrize("name", KERNELS)
    def test_without_xla_the_kernels_give_the_same(name, monkeypatch):
        # Four chunks of tokens.
        internals.set_sizes(monkeypatch.setattr, fewest_rows=3, chunk_bytes=1)
        rng = np.random.default_rng(0)
        x, labels = tf.constant(rng.standard_normal((12, 11)), "float32"), tf.constant(rng.integers(0, 7, 12), "int32")

        def both(x, labels):
            with tf.GradientTape() as tape:
                tape.watch(x)
                loss = tf.reduce_sum(KERNELS[name](x, labels))
            return loss, tape.gradient(loss, x)

        def plain(x, labels):
            with internals.without_xla():
                return both(x, labels)

        specs = [tf.TensorSpec([None, 11]), tf.TensorSpec([None], "int32")]
        compiled, operations = (tf.function(f, specs, autograph=False) for f in (both, plain))
        for one, other in zip(operations(x, labels), compiled(x, labels), strict=True):
            np.testing.assert_allclose(one, other, rtol=2e-6, atol=1e-6)
        graph = operations.get_concrete_function().graph.as_graph_def()
        nodes = [*graph.node, *(node for function in graph.library.function for node in function.node_def)]
        assert not any(node.op.startswith("Xla") for node in nodes)
        assert not any(function.attr["_XlaMustCompile"].b for function in graph.library.function)
        # TensorFlow would hold the logits of ten chunks at once.
        loops = [node.attr["parallel_iterations"].i for node in nodes if "While" in node.op]
        assert set(loops) == ({1} if "linear" in name else set())


def test_rounding_to_bfloat16_is_to_nearest_even_and_keeps_nan():
    bits = np.random.default_rng(0).integers(0, 2**32, 4096, "uint32")
    halves = (np.arange(0x3F80, 0x3FC0, dtype="uint32") << 16) + np.array([[0x7FFF], [0x8000], [0x8001]], "uint32")
    special = np.array([0, 2**31, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF], "uint32")
    x = np.concatenate([bits, halves.reshape(-1), special])
    # Numbers too small to be normal are 0 to some compilers.
    x = x[((x & 0x7F800000) != 0) | (x & 0x7FFFFFFF == 0)].view("float32")
    found = internals.CompiledKernel(lambda x: internals.cast_to_nearest_even(x, "bfloat16"))(tensor(x))
    with np.errstate(invalid="ignore"):
        expected = x.astype(ml_dtypes.bfloat16).astype("float64")
    np.testing.assert_array_equal(to_numpy(found), expected)


def test_one_compilation_for_each_shape_and_option():
    shapes = []

    def halved(x, *, times):
        shapes.append(tuple(x.shape))
        return x * 0.5**times

    program = internals.CompiledKernel(halved)
    for rows in (3, 5, 3, 5, 3):
        np.testing.assert_array_equal(program(ops.ones((rows, 7)), times=1), np.full((rows, 7), 0.5))
    assert shapes == [(3, 7), (5, 7)]
    np.testing.assert_array_equal(program(ops.ones((3, 7)), times=2), np.full((3, 7), 0.25))
    assert shapes == [(3, 7), (5, 7), (3, 7)]
