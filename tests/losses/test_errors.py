"""Bad input is refused, each time with a sentence that says what is allowed and what came."""

import math
import re

import keras
import numpy as np
import pytest

import keras_xent as kx
from tests.backend import BACKEND, MODES, tensor
from tests.internals import set_keras_mask
from tests.losses.cases import ARGUMENTS, CLASSES, NAMES, SOFTMAX, SPARSE, example, make
from tests.tiers import fast_for

every_loss = pytest.mark.parametrize("name", NAMES)


NO_CLASS = (
    "`y_true` must be classes from 0 to 4, since `y_pred` has 5. Received: label {label} at position (1, 2), and 2 "
    "such label(s) in all. "
)


def exactly(sentence):
    return rf"\A{re.escape(sentence)}\Z"


ALIGNED = (
    "`{what}` must line up from the left with the losses, which have shape {shape}: it may have shape {allowed}. "
    "Received: {what} of shape {given}. {fix}"
)
OF_LAYERS = (
    "If it is the Keras mask of the predictions, a layer has passed it on though it changed their shape. Take it off "
    "with a layer that has no mask (`keras.layers.Lambda(lambda x: x)`), or leave out mask_zero=True."
)
STEPS = "For one weight per example give shape [batch] or [batch, 1]; for one per time step [batch, time]."
TWO = "() or (4,) or (4, 1) or (4, 3) or (4, 3, 1)"
ONE = "() or (4,) or (4, 1)"
MISALIGNED = [
    ((4, 3), (3,), TWO),
    ((4, 3), (1, 3), TWO),
    ((4, 3), (4, 2), TWO),
    ((4, 3), (3, 4), TWO),
    ((4, 3), (4, 3, CLASSES), TWO),
    ((4,), (3,), ONE),
    ((4,), (4, 3), ONE),
]


@pytest.mark.parametrize("shape, weights, allowed", MISALIGNED)
@every_loss
def test_sample_weights_of_a_shape_that_does_not_align_are_refused(name, shape, weights, allowed):
    labels, logits = example(name, shape)
    if name == "BinaryCrossentropy" and weights == logits.shape:
        return  # One for each label: tests/field/test_weights_of_labels.py.
    fix = STEPS if len(shape) > 1 else "Give one weight per example."
    sentence = ALIGNED.format(what="sample_weight", shape=shape, allowed=allowed, given=weights, fix=fix)
    with pytest.raises(ValueError, match=exactly(sentence)):
        make(name, from_logits=True)(labels, logits, np.ones(weights, "float32"))


@every_loss
def test_masks_of_a_shape_that_does_not_align_are_refused(name):
    labels, logits = example(name)
    sentence = ALIGNED.format(what="mask", shape=(4, 3), allowed=TWO, given=(3,), fix=OF_LAYERS)
    logits = tensor(logits)
    set_keras_mask(logits, tensor(np.ones((3,), bool)))
    with pytest.raises(ValueError, match=exactly(sentence)):
        make(name, from_logits=True)(labels, logits)


@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize("label", [5, -1, -100, 2**40, -1.0])
def test_an_out_of_range_label_is_refused(name, label):
    _refused(name, label, NO_CLASS + "If it marks padding, say so with `ignore_class={whole}`.")


@pytest.mark.parametrize("name", SPARSE)
def test_labels_that_count_from_1_are_recognized(name):
    labels, logits = example(name, missing=False)
    labels[:], labels[1, 2] = 1, 5
    sentence = NO_CLASS.format(label=5).replace("2 such", "1 such") + (
        "If labels count from 1, subtract 1. If it marks padding, say so with `ignore_class=5`."
    )
    with pytest.raises(ValueError, match=exactly(sentence)):
        make(name, from_logits=True)(labels, logits)


@pytest.mark.parametrize("name", SPARSE)
def test_a_nan_label_is_refused(name):
    fix = "For a missing label give a whole number, such as -1, and say so with `ignore_class=-1`."
    _refused(name, math.nan, NO_CLASS + fix)


@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize("label", [1.5, -0.5, 4.5])
def test_a_label_that_is_not_whole_is_refused(name, label):
    sentence = (
        "`y_true` must be whole numbers, the index of one class each. Received: label {label} at position (1, 2), "
        "and 2 such label(s) in all. For soft targets use the categorical loss."
    )
    _refused(name, label, sentence)


def _refused(name, label, sentence):
    labels, logits = example(name, missing=False)
    labels = labels.astype(type(label))
    labels[0, 0], labels[1, 2], labels[3, 0] = 0, label, label
    if labels.dtype == "int64" and keras.backend.backend() == "jax":
        # JAX has no int64: the largest int32 stands for all that are larger, and is no class either.
        label = min(label, 2**31 - 1)
    with pytest.raises(
        ValueError, match=exactly(sentence.format(label=label, whole=label if math.isnan(label) else int(label)))
    ):
        make(name, from_logits=True)(labels, logits)


@pytest.mark.parametrize("name", SPARSE)
def test_labels_of_the_wrong_rank_are_refused(name):
    _, logits = example(name)
    sentence = (
        "`y_true` must have the shape of `y_pred` without its class axis, one integer for each distribution. Received: "
        "y_true of shape {given} and y_pred of shape (4, 3, 5) with class axis 2, so y_true of shape (4, 3) are "
        "needed.{fix}"
    )
    soft = " For one-hot or soft targets use the categorical loss."
    other = " They fit class axis 1: move it to the end of `y_pred`, or use a loss with `axis=1`."
    for given, fix in (((4,), ""), ((2, 3), ""), ((4, 3, 5), soft), ((4, 5), other)):
        with pytest.raises(ValueError, match=exactly(sentence.format(given=given, fix=fix))):
            make(name, from_logits=True)(np.zeros(given, "int32"), logits)


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 4), (4, 3, 1)])
@pytest.mark.parametrize(
    "name, sentence",
    [
        (
            "BinaryCrossentropy",
            "`y_true` and `y_pred` must have the same shape. Received: y_true of shape {shape} and y_pred of shape "
            "(4, 3, 5).",
        ),
        (
            "CategoricalCrossentropy",
            "`y_true` and `y_pred` must have the same shape, a distribution over the classes each. Received: y_true of "
            "shape {shape} and y_pred of shape (4, 3, 5). For integer labels use SparseCategoricalCrossentropy.",
        ),
    ],
)
def test_targets_of_another_shape_are_refused(name, sentence, shape):
    logits = np.zeros((4, 3, 5), "float32")
    if name == "BinaryCrossentropy" and shape == (4, 3):
        sentence += (
            " For one label per example, a class from 0 to 4, use SparseCategoricalCrossentropy; for a yes-or-no "
            "answer let the model end in one unit."
        )
    with pytest.raises(ValueError, match=exactly(sentence.format(shape=shape))):
        make(name, from_logits=True)(np.zeros(shape, "float32"), logits)


@pytest.mark.parametrize("name", SOFTMAX)
@pytest.mark.parametrize("weights", [[1.0] * 4, [1.0] * 6, [1.0]])
def test_class_weights_for_another_number_of_classes_are_refused(name, weights):
    labels, logits = example(name)
    sentence = (
        "`class_weight` must hold one weight for each of the 5 classes of `y_pred`. "
        f"Received: class_weight of shape ({len(weights)},)."
    )
    with pytest.raises(ValueError, match=exactly(sentence)):
        make(name, from_logits=True, class_weight=weights)(labels, logits)


@pytest.mark.parametrize("name", SOFTMAX)
@pytest.mark.parametrize("label", [5, -1])
def test_a_class_weight_for_an_out_of_range_class_is_refused(name, label):
    labels, logits = example(name)
    sentence = f"`class_weight` must name classes from 0 to 4. Received: class {label}."
    with pytest.raises(ValueError, match=exactly(sentence)):
        make(name, from_logits=True, class_weight={label: 2.0})(labels, logits)


@pytest.mark.parametrize("weights", [[1.0] * 4, [1.0] * 6])
def test_positive_weights_for_another_number_of_labels_are_refused(weights):
    labels, logits = example("BinaryCrossentropy")
    sentence = (
        "`pos_weight` must be one number, or one for each of the 5 labels of an example. "
        f"Received: pos_weight of shape ({len(weights)},)."
    )
    with pytest.raises(ValueError, match=exactly(sentence)):
        kx.losses.BinaryCrossentropy(from_logits=True, pos_weight=weights, ignore_class=-1)(labels, logits)


@pytest.mark.parametrize("name", [*NAMES, "Distillation"])
def test_a_single_number_as_prediction_is_refused(name):
    with pytest.raises(ValueError, match="^`y_pred` must have (a class axis|two classes)"):
        make(name)(1.0, 0.3)


@pytest.mark.parametrize("name", [name for name in NAMES if "axis" in ARGUMENTS[name]])
@pytest.mark.parametrize("axis", [3, -4, 1.0, None, True, np.bool_(True)])
def test_an_axis_out_of_range_is_refused(name, axis):
    labels, logits = example(name)
    sentence = f"`axis` must be an integer from -3 to 2 for predictions of 3 dimensions. Received: axis={axis!r}."
    with pytest.raises(ValueError, match=exactly(sentence)):
        make(name, from_logits=True, axis=axis)(labels, logits)


@pytest.mark.parametrize("name", SOFTMAX)
@pytest.mark.parametrize("option", [{"z_loss": 1e-3}, {"logit_softcap": 3.0}])
def test_z_loss_and_softcap_refuse_probabilities_without_logits(name, option):
    labels, logits = example(name)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    sentence = (
        "`z_loss` and `logit_softcap` need logits, and `y_pred` holds probabilities of which the logits are not known. "
        "End the model in logits and set from_logits=True."
    )
    with pytest.raises(ValueError, match=exactly(sentence)):
        make(name, **option, from_logits=False)(labels, probabilities)


def _unusual():
    """What no loss can read, and what is said of it."""
    names = "Turn names into integers first, for instance with `keras.layers.StringLookup`."
    yield None, "None. Give an array of numbers."
    yield {"a": np.zeros(2)}, "a dict. Give each loss the entry of its own output."
    yield np.array(["cat", "dog"]), f"strings. {names}"
    yield ["cat", "dog"], f"strings. {names}"
    yield np.array([1, None]), f"dtype object. {names}"
    yield np.zeros(2, "complex64"), "dtype complex64. Take its real part or its absolute value."
    yield [[1, 2], [3]], "a list of rows of uneven length. Pad it and mark the padding with a mask or `ignore_class`."
    yield (
        keras.KerasTensor((4, 3)),
        "a symbolic KerasTensor, which has no values. Give the loss to `compile`, or call it in the `call` of a layer, "
        "with `self.add_loss(loss(...))`.",
    )
    if BACKEND == "tensorflow":
        import tensorflow as tf

        yield (
            tf.ragged.constant([[1, 2], [3]]),
            "a ragged tensor. Pad it with `.to_tensor()` and mark the padding with a mask or `ignore_class`.",
        )
        yield tf.sparse.from_dense([[1.0]]), "a sparse tensor. Make it dense with `tf.sparse.to_dense`."
        yield tf.constant(["cat"]), f"strings. {names}"


@pytest.mark.parametrize("argument", ["y_true", "y_pred", "sample_weight"])
@every_loss
def test_inputs_that_are_not_dense_tensors_of_numbers_are_refused(name, argument):
    labels, logits = example(name)
    for value, what in _unusual():
        if argument == "sample_weight" and value is None:
            continue
        inputs = {"y_true": labels, "y_pred": logits, argument: value}
        sentence = f"`{argument}` must be a dense tensor of numbers. Received: {what}"
        with pytest.raises(ValueError, match=exactly(sentence)):
            make(name, from_logits=True)(**inputs)


def test_warnings_point_at_the_line_of_the_user():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile(loss=kx.losses.CategoricalCrossentropy(from_logits=True))
    x, y = np.zeros((4, 2)), np.ones((4, 1))
    for call in (lambda: model.loss(y, model(x)), lambda: model.fit(x, y, verbose=0)):
        with pytest.warns(SyntaxWarning, match="has one class, so the loss is always 0") as warned:
            call()
        assert {w.filename for w in warned if w.category is SyntaxWarning} == {__file__}


# Labels of the binary loss

MARKED = "If it marks a missing label, say so with `ignore_class={marker}`; if not, convert the labels to 0 and 1."


def _binary(label, dtype):
    """Labels 0 and 1, and two that are `label`; logits."""
    labels = np.array([[0, 1, 1], [1, 0, 1]], dtype)
    labels[0, 1] = labels[1, 2] = label
    return labels, np.zeros((2, 3), "float32")


@fast_for("-1-*", "2-*", "1.25-*", "nan-*", "inf-*")
@pytest.mark.parametrize(
    "label, dtype, marker",
    [
        (-1, "int64", "-1"),
        (2, "int32", "2"),
        (255, "uint8", "255"),
        (-1.0, "float32", "-1.0"),
        (1.25, "float16", "1.25"),
        (math.nan, "float32", 'float("nan")'),
        (math.inf, "float32", "inf"),
    ],
)
def test_binary_labels_outside_0_and_1_are_refused(label, dtype, marker):
    sentence = (
        f"`y_true` must be numbers from 0 to 1. Received: label {label} at position (0, 1), and 2 such label(s) in "
        f"all. {MARKED.format(marker=marker)}"
    )
    with pytest.raises(ValueError, match=exactly(sentence)):
        kx.losses.BinaryCrossentropy(from_logits=True)(*_binary(label, dtype))


@pytest.mark.parametrize(
    "label, dtype", [(0.3, "float32"), (1 + 1e-7, "float64"), (-1e-3, "float16"), (True, "bool"), (1, "uint8")]
)
def test_soft_and_rounded_binary_labels_are_not_refused(label, dtype):
    loss = kx.losses.BinaryCrossentropy(from_logits=True)(*_binary(label, dtype))
    np.testing.assert_allclose(float(loss), math.log(2), rtol=1e-6)


@fast_for("graph", "jit")
@pytest.mark.parametrize("mode", MODES)
def test_masked_binary_labels_may_be_anything(mode):
    labels, logits = _binary(7, "float32")
    there = tensor(labels != 7)

    def call(logits, **options):
        return kx.losses.BinaryCrossentropy(from_logits=True, **options)(labels, logits)

    def masked(logits):
        set_keras_mask(logits, there)
        return call(logits)

    def weighted(logits):
        return kx.losses.BinaryCrossentropy(from_logits=True)(labels, logits, [0.0, 0.0])

    run = MODES[mode]
    np.testing.assert_allclose(float(run(lambda x: call(x, ignore_class=7))(logits)), math.log(2), rtol=1e-6)
    np.testing.assert_allclose(float(run(masked)(tensor(logits))), math.log(2), rtol=1e-6)
    assert float(run(weighted)(logits)) == 0.0


@fast_for("255-*")
@pytest.mark.skipif(BACKEND != "tensorflow", reason="only TensorFlow asserts in a graph")
@pytest.mark.parametrize("label, dtype", [(-1, "int32"), (255, "uint8"), (math.nan, "float32")])
def test_binary_labels_outside_0_and_1_are_an_error_in_a_graph(label, dtype):
    import tensorflow as tf

    labels, logits = _binary(label, dtype)
    loss = tf.function(kx.losses.BinaryCrossentropy(from_logits=True), autograph=False)
    with pytest.raises(tf.errors.InvalidArgumentError) as caught:
        loss(tf.constant(labels), tf.constant(logits))
    for part in ("`y_true` must be numbers from 0 to 1. Received: label", str(label), "`ignore_class`"):
        assert part in caught.value.message
    # No labels are no error.
    loss(tf.zeros((0, 3), labels.dtype), tf.zeros((0, 3)))
