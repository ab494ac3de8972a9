"""The same loss, the same gradient and the same training in every mode of the backend, and on two replicas."""

import functools
import json
import subprocess
import sys

import keras
import numpy as np
import pytest

import keras_xent as kx
from tests.backend import MODES, environment, every_mode, tensorflow_only
from tests.losses import replicas
from tests.losses.cases import CLASSES, NAMES, arguments, example, make
from tests.losses.running import assert_close, run
from tests.tiers import fast_for, sample, whole

every_loss = pytest.mark.parametrize("name", NAMES)
COMPILED = [mode for mode in MODES if mode != "eager"]


# One loss

OF_TOKENS = ("token_mean", "sequence_mean")


@fast_for("Binary*-xla", "Masked*-xla", "Binary*-jit", "Masked*-jit")
@pytest.mark.parametrize("mode", COMPILED)
@pytest.mark.parametrize(
    "name, reduction",
    sample(
        [(name, reduction) for name in NAMES for reduction in ("sum_over_batch_size", *OF_TOKENS, None)],
        [(name, OF_TOKENS[i % 2]) for i, name in enumerate(NAMES)],
    ),
)
def test_same_loss_and_gradient_as_in_eager_mode(name, reduction, mode):
    rng = np.random.default_rng(4)
    labels, logits = example(name)
    arrays = {"sample_weight": rng.uniform(0, 2, (4,)).astype("float32"), "mask": rng.random((4, 3)) < 0.7}
    loss = make(name, **arguments(name), reduction=reduction)
    expected, expected_gradient = run(loss, labels, logits, **arrays)
    result, gradient = run(loss, labels, logits, **arrays, mode=mode)
    assert_close(result, expected)
    assert_close(gradient, expected_gradient, scale=1e-6)


@pytest.mark.whole
@every_mode
@pytest.mark.parametrize("name", sample(NAMES, [NAMES[0], NAMES[-1]]))
def test_the_same_inputs_give_the_same_bits(name, mode):
    labels, logits = example(name)
    loss = make(name, **arguments(name))
    first, again = run(loss, labels, logits, mode=mode), run(loss, labels, logits, mode=mode)
    assert np.array_equal(first[0], again[0])
    assert np.array_equal(first[1], again[1])


UNKNOWN = ("batch", "batch and time", "all")


@fast_for("SparseCategoricalCrossentropy-*")
@tensorflow_only(reason="shapes are always known to JAX")
@pytest.mark.parametrize(
    "name, unknown, jit_compile",
    sample(
        [(name, unknown, jit) for name in NAMES for unknown in UNKNOWN for jit in (False, True)],
        [(name, UNKNOWN[-1], i % 2 == 1) for i, name in enumerate(NAMES)],
    ),
)
def test_dimensions_may_be_unknown(name, unknown, jit_compile):
    import tensorflow as tf

    labels, logits = example(name)
    known = {"batch": (3, CLASSES), "batch and time": (CLASSES,), "all": ()}[unknown]
    shape = (None,) * (3 - len(known)) + known
    signature = [
        tf.TensorSpec(shape[: labels.ndim], labels.dtype),
        tf.TensorSpec(shape, "float32"),
        tf.TensorSpec((None,), "float32"),
    ]
    loss = make(name, **arguments(name))
    function = tf.function(loss, input_signature=signature, autograph=False, jit_compile=jit_compile)
    weights = np.array([1.5, 0.0, 2.0, 1.0], "float32")
    assert_close(function(labels, logits, weights), float(loss(labels, logits, weights)))
    assert_close(function(labels[:2], logits[:2], weights[:2]), float(loss(labels[:2], logits[:2], weights[:2])))


@tensorflow_only(reason="ranks are always known to JAX")
@every_loss
def test_an_unknown_rank_is_refused(name):
    import tensorflow as tf

    labels, logits = example(name)
    signature = [tf.TensorSpec(None, labels.dtype), tf.TensorSpec(None, "float32")]
    function = tf.function(make(name, from_logits=True), input_signature=signature, autograph=False)
    with pytest.raises(ValueError, match="number of dimensions is not known"):
        function(labels, logits)


# Training

FITS = {
    "run_eagerly": {"run_eagerly": True},
    "auto": {"jit_compile": "auto"},
    "jit_compile": {"jit_compile": True},
    "no jit_compile": {"jit_compile": False},
    "steps_per_execution": {"steps_per_execution": 2, "jit_compile": False},
    "steps_per_execution and jit_compile": {"steps_per_execution": 2, "jit_compile": True},
}


SOME_FITS = ("jit_compile", "steps_per_execution")


@functools.cache
def _trained(name, fit):
    """Losses of two epochs and the weights after them; padded tokens, a mask, sample weights, all options."""
    rng = np.random.default_rng(5)
    labels, _ = example(name, (8, 3), seed=6)
    tokens = rng.integers(0, 7, (8, 3))
    tokens[0] = 0
    weights = np.array([1.0, 2.0, 0.0, 1.5, 1.0, 0.5, 1.0, 3.0], "float32")
    keras.utils.set_random_seed(7)
    model = keras.Sequential(
        [keras.Input((3,), dtype="int32"), keras.layers.Embedding(7, 4, mask_zero=True), keras.layers.Dense(CLASSES)]
    )
    loss = make(name, **arguments(name), reduction="token_mean")
    model.compile(keras.optimizers.SGD(0.5), loss, **FITS[fit])
    history = model.fit(tokens, labels, 2, 2, sample_weight=weights, shuffle=False, verbose=0).history["loss"]
    return history, [np.array(w) for w in model.get_weights()]


@fast_for("MaskedSequenceCrossentropy-auto", "MaskedSequenceCrossentropy-jit_compile")
@pytest.mark.parametrize(
    "name, fit",
    sample(
        [(name, fit) for name in NAMES for fit in FITS if fit != "run_eagerly"],
        [*[(name, "auto") for name in NAMES], *[("MaskedSequenceCrossentropy", fit) for fit in SOME_FITS]],
    ),
)
def test_fit_trains_the_same_in_every_mode(name, fit):
    (expected, expected_weights), (history, weights) = _trained(name, "run_eagerly"), _trained(name, fit)
    assert history[1] < history[0]
    assert_close(history, expected, rtol=1e-5)
    for ours, theirs in zip(weights, expected_weights, strict=True):
        assert_close(ours, theirs, scale=1e-5)


def test_class_weights_are_those_of_each_token_s_class():
    """What `fit(class_weight=...)` does to sequences is to weigh rows by one of their tokens."""
    labels = np.array([[4, 1, 2], [0, 1, 3]])
    weights = np.array([30.0, 1.0, 2.0, 0.5, 5.0])
    model = keras.Sequential([keras.Input((3, 4)), keras.layers.Dense(CLASSES, kernel_initializer="zeros")])
    model.compile(loss=kx.losses.SparseCategoricalCrossentropy(from_logits=True, class_weight=weights, reduction="sum"))
    loss = model.evaluate(np.ones((2, 3, 4)), labels, verbose=0)
    assert_close(loss, weights[labels].sum() * np.log(CLASSES))


# Two replicas


@pytest.fixture(scope="module")
def on_replicas():
    command = [sys.executable, "-m", replicas.__name__]
    child = subprocess.run(command, env=environment(CUDA_VISIBLE_DEVICES="-1"), capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout.splitlines()[-1])


@tensorflow_only(reason="tf.distribute is TensorFlow's")
@whole
def test_a_sum_on_two_replicas_is_that_on_one_device(on_replicas):
    """In the log too, where a replica has no rows of the last batch. The means over tokens are in tests/scaling."""
    one, two = (on_replicas["sum"][where] for where in ("one device", "two replicas"))
    assert_close(two["loss"], one["loss"], rtol=1e-5)
    for ours, theirs in zip(two["weights"], one["weights"], strict=True):
        assert_close(np.array(ours), np.array(theirs), scale=1e-5)


@tensorflow_only(reason="tf.distribute is TensorFlow's")
@whole
def test_outside_replicas_a_token_mean_in_the_scope_of_a_strategy_is_of_the_whole_batch(on_replicas):
    values = on_replicas["without replicas"]
    assert_close(values["in the scope"], values["outside"], rtol=1e-6)


@tensorflow_only(reason="tf.distribute is TensorFlow's")
@whole
def test_two_replicas_with_keras_reduction_do_as_keras_does(on_replicas):
    ours, theirs = (on_replicas["sum_over_batch_size"][who] for who in ("two replicas", "keras on two replicas"))
    assert_close(ours["loss"], theirs["loss"], rtol=1e-5)
    for one, other in zip(ours["weights"], theirs["weights"], strict=True):
        assert_close(np.array(one), np.array(other), scale=1e-5)
