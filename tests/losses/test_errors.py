"""Bad input is refused, each time with a sentence that says what is allowed and what came."""

import math
import re

import keras
import numpy as np
import pytest

import keras_xent as kx
from tests.backend import BACKEND, tensor
from tests.losses.cases import ARGUMENTS, CLASSES, DROP_INS, NAMES, SOFTMAX, SPARSE, example, make

every_loss = pytest.mark.parametrize("name", NAMES)


def exactly(sentence):
    return rf"\A{re.escape(sentence)}\Z"


ALIGNED = (
    "`{what}` must line up from the left with the losses, which have shape {shape}: it may have shape {allowed}. "
    "Received: {what} of shape {given}. For one weight per example give shape [batch] or [batch, 1]; for one per time "
    "step give the whole [batch, time]."
)
MISALIGNED = [
    ((4, 3), (3,), "(4,) or (4, 1) or (4, 3)"),
    ((4, 3), (1, 3), "(4,) or (4, 1) or (4, 3)"),
    ((4, 3), (4, 2), "(4,) or (4, 1) or (4, 3)"),
    ((4, 3), (3, 4), "(4,) or (4, 1) or (4, 3)"),
    ((4, 3), (4, 3, CLASSES), "(4,) or (4, 1) or (4, 3)"),
    ((4,), (3,), "(4,)"),
    ((4,), (4, 3), "(4,)"),
]


@pytest.mark.parametrize("shape, weights, allowed", MISALIGNED)
@every_loss
def test_weights_that_fit_nothing_are_refused(name, shape, weights, allowed):
    labels, logits = example(name, shape)
    sentence = ALIGNED.format(what="sample_weight", shape=shape, allowed=allowed, given=weights)
    with pytest.raises(ValueError, match=exactly(sentence)):
        make(name, from_logits=True)(labels, logits, np.ones(weights, "float32"))


@every_loss
def test_masks_that_fit_nothing_are_refused(name):
    labels, logits = example(name)
    sentence = ALIGNED.format(what="mask", shape=(4, 3), allowed="(4,) or (4, 1) or (4, 3)", given=(3,))
    logits = tensor(logits)
    keras.src.backend.set_keras_mask(logits, tensor(np.ones((3,), bool)))
    with pytest.raises(ValueError, match=exactly(sentence)):
        make(name, from_logits=True)(labels, logits)


FRACTION = "must be a number in [0, 1]"
NOT_NEGATIVE = "must be a number of at least 0"
POSITIVE = "must be None or a number above 0"
WEIGHTS = "must hold numbers of at least 0"
REDUCTION = (
    "must be one of 'sum_over_batch_size', 'mean', 'mean_with_sample_weight', 'sum', 'none', None, 'token_mean', "
    "'sequence_mean'"
)
OUT_OF_RANGE = [
    (NAMES, "label_smoothing", FRACTION, (1.5, -0.1, math.nan, "0.1", None, True)),
    (NAMES, "reduction", REDUCTION, ("average", "tokens", 0, True)),
    (SOFTMAX, "z_loss", NOT_NEGATIVE, (-1e-4, math.nan, None)),
    (SOFTMAX, "logit_softcap", POSITIVE, (0, -3.0, math.nan)),
    (SOFTMAX, "class_weight", WEIGHTS, ([1.0, -1.0], {0: -1.0}, [1.0, math.nan])),
    (DROP_INS, "focal_gamma", NOT_NEGATIVE, (-1.0, math.nan, None)),
    (["BinaryCrossentropy"], "focal_alpha", FRACTION, (1.5, -0.1)),
    (["BinaryCrossentropy"], "pos_weight", WEIGHTS, (-2.0, [1.0, -1.0])),
    (["MaskedSequenceCrossentropy"], "normalizer", POSITIVE, (0, -1.0, math.nan)),
]


@pytest.mark.parametrize(
    "name, argument, rule, bad",
    [(name, argument, rule, bad) for names, argument, rule, values in OUT_OF_RANGE for name in names for bad in values],
)
def test_arguments_out_of_their_range_are_refused(name, argument, rule, bad):
    with pytest.raises(ValueError, match=exactly(f"`{argument}` {rule}. Received: {argument}={bad!r}.")):
        make(name, **{argument: bad})


def test_a_normalizer_of_losses_that_are_not_reduced_is_refused():
    sentence = (
        "`normalizer` must be None for losses that are not reduced. Received: normalizer=2.0 with reduction=None."
    )
    with pytest.raises(ValueError, match=exactly(sentence)):
        kx.losses.MaskedSequenceCrossentropy(normalizer=2.0, reduction=None)


@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize("label", [5, -1, -100, 2**40, math.nan, -1.0])
def test_a_label_that_is_no_class_is_refused(name, label):
    sentence = (
        "`labels` must be classes from 0 to 4, since the logits have 5. Received: label {label} at position (1, 2), "
        "and 2 such label(s) in all. If it marks padding, say so with `ignore_class={label}`."
    )
    _refused(name, label, sentence)


@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize("label", [1.5, -0.5, 4.5])
def test_a_label_that_is_not_whole_is_refused(name, label):
    sentence = (
        "`labels` must be whole numbers, the index of one class each. Received: label {label} at position (1, 2), "
        "and 2 such label(s) in all. For soft targets use the categorical loss."
    )
    _refused(name, label, sentence)


def _refused(name, label, sentence):
    labels, logits = example(name, missing=False)
    labels = labels.astype(type(label))
    labels[1, 2] = labels[3, 0] = label
    if labels.dtype == "int64" and keras.backend.backend() == "jax":
        # JAX has no int64: the largest int32 stands for all that are larger, and is no class either.
        label = min(label, 2**31 - 1)
    with pytest.raises(ValueError, match=exactly(sentence.format(label=label))):
        make(name, from_logits=True)(labels, logits)


@pytest.mark.parametrize("name", SPARSE)
def test_labels_of_the_wrong_rank_are_refused(name):
    labels, logits = example(name)
    sentence = (
        "`labels` must have the shape of `logits` without its class axis, one integer for each distribution. Received: "
        "labels of shape (4,) and logits of shape (4, 3, 5) with class axis 2, so labels of shape (4, 3) are needed. "
        "For one-hot or soft targets use the categorical loss."
    )
    with pytest.raises(ValueError, match=exactly(sentence)):
        make(name, from_logits=True)(labels[:, 0], logits)
    with pytest.raises(ValueError, match=exactly(sentence.replace("(4,) and", "(4, 3, 5) and"))):
        make(name, from_logits=True)(np.zeros((4, 3, 5), "int32"), logits)


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
    with pytest.raises(ValueError, match=exactly(sentence.format(shape=shape))):
        make(name, from_logits=True)(np.zeros(shape, "float32"), logits)


@pytest.mark.parametrize("name", SOFTMAX)
@pytest.mark.parametrize("weights", [[1.0] * 4, [1.0] * 6, [1.0]])
def test_class_weights_for_another_number_of_classes_are_refused(name, weights):
    labels, logits = example(name)
    sentence = (
        "`class_weight` must hold one weight for each of the 5 classes of the logits. "
        f"Received: class_weight of shape ({len(weights)},)."
    )
    with pytest.raises(ValueError, match=exactly(sentence)):
        make(name, from_logits=True, class_weight=weights)(labels, logits)


@pytest.mark.parametrize("name", SOFTMAX)
@pytest.mark.parametrize("label", [5, -1])
def test_a_class_weight_for_a_class_that_is_none_is_refused(name, label):
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
        kx.losses.BinaryCrossentropy(from_logits=True, pos_weight=weights)(labels, logits)


@pytest.mark.parametrize("name", [name for name in NAMES if "axis" in ARGUMENTS[name]])
@pytest.mark.parametrize("axis", [3, -4, 1.0, None, True])
def test_an_axis_that_is_none_is_refused(name, axis):
    labels, logits = example(name)
    sentence = f"`axis` must be an integer from -3 to 2 for predictions of 3 dimensions. Received: axis={axis!r}."
    with pytest.raises(ValueError, match=exactly(sentence)):
        make(name, from_logits=True, axis=axis)(labels, logits)


@pytest.mark.parametrize("name", SOFTMAX)
@pytest.mark.parametrize("option", [{"z_loss": 1e-3}, {"logit_softcap": 3.0}])
def test_what_needs_logits_refuses_bare_probabilities(name, option):
    labels, logits = example(name)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    sentence = (
        "`z_loss` and `logit_softcap` need logits, and `y_pred` holds probabilities of which the logits are not known. "
        "End the model in logits and set from_logits=True."
    )
    with pytest.raises(ValueError, match=exactly(sentence)):
        make(name, **option, from_logits=False)(labels, probabilities)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="only TensorFlow has ragged tensors")
@pytest.mark.parametrize("which", ["y_true", "y_pred"])
@every_loss
def test_ragged_tensors_are_refused(name, which):
    import tensorflow as tf

    labels, logits = example(name)
    ragged = tf.ragged.constant([[1, 2], [3]])
    inputs = {"y_true": labels, "y_pred": logits, which: ragged}
    sentence = (
        f"`{which}` must be a dense tensor. Received: a ragged tensor. Pad it with `.to_tensor()` and mark the padding "
        "with a mask or `ignore_class`."
    )
    with pytest.raises(ValueError, match=exactly(sentence)):
        make(name)(**inputs)
