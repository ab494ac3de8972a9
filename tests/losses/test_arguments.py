"""Arguments are checked when a loss is made, each with a sentence that says what is allowed and what came."""

import json
import math
import re

import numpy as np
import pytest

import keras_xent as kx
from tests.backend import tensor
from tests.losses.cases import ARGUMENTS, DROP_INS, NAMES, SOFTMAX, SPARSE, example, make


def exactly(sentence):
    return rf"\A{re.escape(sentence)}\Z"


FRACTION = "must be a number in [0, 1]"
NOT_NEGATIVE = "must be a number of at least 0"
POSITIVE = "must be None or a number above 0"
WEIGHTS = "must hold numbers of at least 0"
OF_CLASSES = "must be None, a list with one number for each class, or a dict from class to number"
OF_LABELS = "must be None, a number, or a list with one number for each label of an example"
CLASS = "must be None or a whole number, the label that does not count"
LABEL = "must be None or a number (nan is one), the label that does not count"
DTYPE = "must be None or one of 'bfloat16', 'float16', 'float32', 'float64'"
NOT_A_LIST = ("balanced", ["1", "2"], [[1.0, 1.0]], [1.0, None], [1j])
REDUCTION = (
    "must be one of 'sum_over_batch_size', 'mean', 'mean_with_sample_weight', 'sum', 'none', 'token_mean', "
    "'sequence_mean', None"
)
OUT_OF_RANGE = [
    (NAMES, "from_logits", "must be True or False", ("yes", 0.1, 1, None)),
    (NAMES, "dtype", DTYPE, ("int32", "bool", "complex64", "float", 3)),
    (SPARSE, "ignore_class", CLASS, (True, 1.5, math.nan, math.inf, [0], "0")),
    (["BinaryCrossentropy"], "ignore_class", LABEL, (True, math.inf, [0], "-1")),
    (SOFTMAX, "class_weight", OF_CLASSES, (2.0, {0: "a"}, *NOT_A_LIST)),
    (["BinaryCrossentropy"], "pos_weight", OF_LABELS, ({0: 1.0}, True, *NOT_A_LIST)),
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
    # Keras' sentence about a reduction begins so.
    start = "Invalid value for argument: " if argument == "reduction" else ""
    with pytest.raises(ValueError, match=exactly(f"{start}`{argument}` {rule}. Received: {argument}={bad!r}.")):
        make(name, **{argument: bad})


def test_a_normalizer_of_losses_that_are_not_reduced_is_refused():
    sentence = (
        "`normalizer` must be None for losses that are not reduced. Received: normalizer=2.0 with reduction=None."
    )
    with pytest.raises(ValueError, match=exactly(sentence)):
        kx.losses.MaskedSequenceCrossentropy(normalizer=2.0, reduction=None)


@pytest.mark.parametrize("name", SPARSE)
def test_an_ignore_class_between_0_and_1_is_suspected_of_being_label_smoothing(name):
    """The second argument of the dense loss is the smoothing, so that moving to the sparse one brings it here."""
    sentence = f"`ignore_class` {CLASS}. Received: ignore_class=0.1. For label smoothing say label_smoothing=0.1."
    with pytest.raises(ValueError, match=exactly(sentence)):
        make(name, ignore_class=0.1)


@pytest.mark.parametrize("name", [name for name in NAMES if "axis" in ARGUMENTS[name]])
def test_integers_of_numpy_are_integers(name):
    labels, logits = example(name, axis=1)
    loss = make(
        name,
        from_logits=True,
        axis=np.int64(1),
        **({} if name == "CategoricalCrossentropy" else {"ignore_class": np.int32(-1)}),
    )
    assert type(loss.get_config()["axis"]) is int
    assert np.isfinite(float(loss(labels, logits)))


PERPLEXITY = [
    ("logit_softcap", POSITIVE, -1.0),
    ("ignore_class", CLASS, "0"),
    ("from_logits", "must be True or False", 1),
    ("dtype", DTYPE, "int32"),
]


@pytest.mark.parametrize("argument, rule, bad", PERPLEXITY)
def test_perplexity_refuses_the_same(argument, rule, bad):
    with pytest.raises(ValueError, match=exactly(f"`{argument}` {rule}. Received: {argument}={bad!r}.")):
        kx.metrics.Perplexity(**{argument: bad})


@pytest.mark.parametrize("number", [np.array, tensor], ids=["array", "tensor"])
def test_numbers_may_be_arrays_of_one(number):
    for name in DROP_INS:
        labels, logits = example(name, missing=False)
        options = {"label_smoothing": 0.125, "focal_gamma": 1.5}
        plain = make(name, from_logits=True, **options)
        given = make(name, from_logits=True, **{key: number(value) for key, value in options.items()})
        assert json.loads(json.dumps(given.get_config())) == plain.get_config()
        assert float(given(labels, logits)) == float(plain(labels, logits))
    smoothed = kx.losses.binary_crossentropy
    labels, p = np.array([[1.0, 0.0]], "float32"), np.array([[0.7, 0.4]], "float32")
    assert float(smoothed(labels, p, label_smoothing=number(0.125))[0]) == float(smoothed(labels, p, False, 0.125)[0])
