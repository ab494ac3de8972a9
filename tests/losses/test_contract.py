"""What every loss of the package keeps to: its arguments, their configuration, and the values they stand for."""

import inspect
import json
import math
import subprocess
import sys
import textwrap

import keras
import numpy as np
import pytest

import keras_xent as kx
from tests.backend import DTYPES, environment, tensor, to_numpy
from tests.losses import reference
from tests.losses.cases import (
    ARGUMENTS,
    CLASS_WEIGHT,
    CLASSES,
    DROP_INS,
    NAMES,
    SOFTMAX,
    SPARSE,
    arguments,
    example,
    formula,
    make,
    parameters,
)
from tests.losses.running import assert_close, run, value
from tests.tiers import fast_for, sample, whole

every_loss = pytest.mark.parametrize("name", NAMES)
# The constructors


@every_loss
def test_the_table_of_cases_leaves_no_argument_out(name):
    assert list(ARGUMENTS[name]) == list(parameters(name))
    for argument, parameter in parameters(name).items():
        assert ARGUMENTS[name][argument] != parameter.default, argument


@pytest.mark.parametrize("name", DROP_INS)
def test_positional_arguments_are_those_of_keras(name):
    theirs = inspect.signature(getattr(keras.losses, name).__init__).parameters
    ours = inspect.signature(getattr(kx.losses, name).__init__).parameters
    positional = {n: p for n, p in ours.items() if p.kind is not inspect.Parameter.KEYWORD_ONLY}
    assert [(n, p.default) for n, p in positional.items()] == [(n, p.default) for n, p in theirs.items()]


SIGNATURES = {
    "BinaryCrossentropy": "(from_logits=False, label_smoothing=0.0, axis=-1, reduction='sum_over_batch_size', "
    "name='binary_crossentropy', dtype=None, *, pos_weight=None, focal_gamma=0.0, focal_alpha=None, "
    "ignore_class=None)",
    "CategoricalCrossentropy": "(from_logits=False, label_smoothing=0.0, axis=-1, reduction='sum_over_batch_size', "
    "name='categorical_crossentropy', dtype=None, *, class_weight=None, focal_gamma=0.0, z_loss=0.0, "
    "logit_softcap=None)",
    "MaskedSequenceCrossentropy": "(*, from_logits=True, ignore_class=None, label_smoothing=0.0, class_weight=None, "
    "z_loss=0.0, logit_softcap=None, normalizer=None, reduction='token_mean', name='masked_sequence_crossentropy', "
    "dtype=None)",
    "SparseCategoricalCrossentropy": "(from_logits=False, ignore_class=None, reduction='sum_over_batch_size', axis=-1, "
    "name='sparse_categorical_crossentropy', dtype=None, *, label_smoothing=0.0, class_weight=None, focal_gamma=0.0, "
    "z_loss=0.0, logit_softcap=None)",
}


@every_loss
def test_the_signature_is_that_of_the_contract(name):
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in parameters(name).values()]
    assert str(inspect.Signature(plain)) == SIGNATURES[name]


# Configuration

CONFIGURATIONS = [
    *[(name, {}) for name in NAMES],
    *[(name, ARGUMENTS[name]) for name in NAMES],
    *[(name, {"reduction": None}) for name in NAMES],
    *[(name, {"class_weight": {0: 2.0, 3: 0.5}}) for name in SOFTMAX],
    ("BinaryCrossentropy", {"ignore_class": math.nan}),
    ("BinaryCrossentropy", {"pos_weight": 2.5}),
]


def given(name, options):
    """The configuration that must come out: the arguments given, the others at their defaults."""
    return {**{n: p.default for n, p in parameters(name).items()}, **options}


def same(config, expected):
    """Equality in which nan equals nan, and 2 does not equal 2.0 or True."""
    return repr(sorted(config.items())) == repr(sorted(expected.items()))


@pytest.mark.parametrize("name, options", CONFIGURATIONS)
def test_every_argument_survives_its_configuration(name, options):
    loss, cls, expected = make(name, **options), getattr(kx.losses, name), given(name, options)
    assert same(loss.get_config(), expected)
    assert same(cls.from_config(loss.get_config()).get_config(), expected)
    assert same(cls.from_config(json.loads(json.dumps(loss.get_config()))).get_config(), expected)
    serialized = json.loads(json.dumps(keras.saving.serialize_keras_object(loss)))
    revived = keras.saving.deserialize_keras_object(serialized)
    assert type(revived) is cls
    assert same(revived.get_config(), expected)
    assert revived.dtype == loss.dtype == keras.backend.standardize_dtype(expected["dtype"] or "float32")


@pytest.mark.parametrize("weights", [np.array(CLASS_WEIGHT), np.array(CLASS_WEIGHT, "float32"), tuple(CLASS_WEIGHT)])
def test_arrays_are_kept_as_lists_that_json_can_hold(weights):
    for name, argument in [("BinaryCrossentropy", "pos_weight"), *[(name, "class_weight") for name in SOFTMAX]]:
        assert make(name, **{argument: weights}).get_config()[argument] == CLASS_WEIGHT


@every_loss
def test_a_dtype_policy_is_kept_by_its_name(name):
    loss = make(name, dtype=keras.DTypePolicy("bfloat16"))
    assert loss.dtype == "bfloat16"
    assert json.loads(json.dumps(loss.get_config()))["dtype"] == "bfloat16"


@every_loss
def test_every_loss_is_registered_under_the_name_of_the_package(name):
    assert keras.saving.get_registered_name(getattr(kx.losses, name)) == f"keras_xent>{name}"


def _model(name):
    """Ends in logits `[T, C]`, from tokens, with a mask."""
    return keras.Sequential(
        [keras.Input((3,)), keras.layers.Embedding(7, 4, mask_zero=True), keras.layers.Dense(CLASSES)], name=name
    )


@whole
def test_compiled_models_load_in_a_fresh_process(tmp_path):
    """Each configuration above, and one per loss that is also evaluated."""
    x = np.array([[1, 2, 0], [3, 4, 5]])
    losses = [(name, options, False) for name, options in CONFIGURATIONS]
    losses += [(name, arguments(name, reduction=ARGUMENTS[name]["reduction"]), True) for name in NAMES]
    expected = []
    for i, (name, options, evaluated) in enumerate(losses):
        model = _model(f"model_{i}")
        model.compile(loss=make(name, **options), jit_compile=False)
        y = example(name, (2, 3))[0]
        np.save(tmp_path / f"{i}.npy", y)
        model.save(tmp_path / f"{i}.keras")
        expected.append(model.evaluate(x, y, verbose=0) if evaluated else None)
    script = textwrap.dedent(f"""
        import sys, keras, numpy as np, keras_xent
        for i, evaluated in enumerate({[evaluated for _, _, evaluated in losses]}):
            model = keras.models.load_model(f"{{sys.argv[1]}}/{{i}}.keras")
            y = np.load(f"{{sys.argv[1]}}/{{i}}.npy")
            result = model.evaluate(np.array({x.tolist()}), y, verbose=0) if evaluated else None
            print(repr((type(model.loss).__name__, model.loss.get_config(), result)))
    """)
    child = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], env=environment(), capture_output=True, text=True
    )
    assert child.returncode == 0, child.stderr
    lines = child.stdout.splitlines()
    assert len(lines) == len(losses)
    for line, (name, options, _), before in zip(lines, losses, expected, strict=True):
        loaded, config, after = eval(line, {"nan": math.nan})
        assert loaded == name
        assert same(config, given(name, options))
        assert after == before


# Values


@fast_for("(4, 3)-*")
@every_loss
@pytest.mark.parametrize("shape", [(12,), (4, 3), (2, 3, 2)], ids=str)
def test_all_arguments_together_give_the_value_and_gradient_of_the_formula(name, shape):
    options = arguments(name)
    labels, logits = example(name, shape, seed=len(shape))
    losses, gradients, labelled, _ = reference.elements(name, labels, logits, **formula(options))
    result, gradient = run(make(name, **options, reduction="sum"), labels, logits)
    assert_close(result, (losses * labelled).sum())
    assert_close(gradient, gradients * labelled[..., None], scale=1e-6)


ONE_BY_ONE = [(name, argument) for name in NAMES for argument in arguments(name) if argument != "from_logits"]


@fast_for("Masked*")
@pytest.mark.parametrize("name, argument", ONE_BY_ONE)
def test_each_argument_alone_does_what_the_formula_says(name, argument):
    options = {argument: arguments(name)[argument]}
    labels, logits = example(name, missing=argument == "ignore_class")
    losses, *_ = reference.elements(name, labels, logits, **formula(options))
    ours = value(make(name, **options, from_logits=True, reduction=None), labels, logits)
    assert_close(ours, losses)
    without = np.where(labels < 0, 0, labels)
    plain, *_ = reference.elements(name, without, logits)
    assert np.abs(plain - losses).max() > 1e-2, "the example does not show what the argument does"


@fast_for("-2-Sparse*")
@pytest.mark.parametrize("name", [name for name in NAMES if "axis" in ARGUMENTS[name]])
@pytest.mark.parametrize("axis", sample([0, 1, 2, -2, -3], [0, -2]))
def test_the_class_axis_may_be_any(name, axis):
    """The same as moving the axis to the end."""
    options = arguments(name, reduction="sum")
    labels, logits = example(name)
    expected, expected_gradient = run(make(name, **options), labels, logits)
    labels, logits = example(name, axis=axis)
    result, gradient = run(make(name, **options, axis=axis), labels, logits)
    assert_close(result, expected)
    assert_close(np.moveaxis(gradient, axis, -1), expected_gradient, scale=1e-6)


@fast_for("bfloat16-MaskedSequenceCrossentropy", "bfloat16-BinaryCrossentropy")
@every_loss
@pytest.mark.parametrize("dtype", sample(DTYPES, ["bfloat16"]))
def test_the_result_has_the_dtype_of_the_loss_and_the_gradient_that_of_the_logits(name, dtype):
    labels, logits = example(name)
    loss = make(name, **arguments(name), dtype=dtype)(labels, logits)
    assert keras.backend.standardize_dtype(loss.dtype) == dtype
    exact = value(make(name, **arguments(name)), labels, logits)
    assert_close(to_numpy(loss), exact, rtol={"bfloat16": 2**-8, "float16": 2**-11}.get(dtype, 2e-6))
    losses, gradients, labelled, _ = reference.elements(
        name, labels, to_numpy(tensor(logits, dtype)), **formula(arguments(name))
    )
    result, gradient = run(make(name, **arguments(name), reduction="sum"), labels, tensor(logits, dtype))
    assert_close(result, (losses * labelled).sum())
    # One rounding to the logits' dtype, and nothing else.
    exact = gradients * labelled[..., None]
    rounding = {"bfloat16": 2**-8, "float16": 2**-10}.get(dtype, 0)
    assert np.all(np.abs(gradient - exact) <= rounding * np.abs(exact) + 1e-6 * np.abs(exact).max())


@fast_for("MaskedSequenceCrossentropy")
@pytest.mark.skipif("float64" not in DTYPES, reason="JAX has no float64 unless asked")
@every_loss
def test_a_float64_loss_is_computed_in_float64_whatever_the_logits(name):
    labels, logits = example(name)
    losses, gradients, labelled, _ = reference.elements(name, labels, logits, **formula(arguments(name)))
    loss = make(name, **arguments(name), reduction="sum", dtype="float64")
    result, gradient = run(loss, labels, logits)
    assert_close(result, (losses * labelled).sum(), rtol=1e-13)
    assert_close(gradient, gradients * labelled[..., None], scale=1e-7)


EQUIVALENTS = {
    "BinaryCrossentropy": lambda y, x: np.mean(np.maximum(x, 0) - x * y + np.log1p(np.exp(-np.abs(x)))),
    "CategoricalCrossentropy": lambda y, x: -np.mean(np.sum(y * _log_softmax(x), axis=-1)),
    "MaskedSequenceCrossentropy": lambda y, x: -np.mean(np.take_along_axis(_log_softmax(x), y[..., None], -1)),
    "SparseCategoricalCrossentropy": lambda y, x: -np.mean(np.take_along_axis(_log_softmax(x), y[..., None], -1)),
}


def _log_softmax(x):
    return x - np.log(np.sum(np.exp(x), axis=-1, keepdims=True))


@every_loss
def test_without_options_it_equals_three_lines_of_numpy(name):
    labels, logits = example(name, missing=False)
    expected = EQUIVALENTS[name](labels, logits.astype("float64"))
    assert_close(value(make(name, from_logits=True), labels, logits), expected)


def _inputs_of_keras():
    """Labels, probabilities and weights of the shapes and types that `keras.losses` takes beside the plain ones."""
    rng = np.random.default_rng(17)

    def p(*shape):
        return rng.uniform(0.05, 0.95, shape).astype("float32")

    def y(classes, *shape):
        return rng.integers(0, classes, shape)

    binary, dense, sparse = DROP_INS
    return [
        (binary, y(2, 4), p(4), None),
        (binary, y(2, 4), p(4, 1), None),
        (binary, y(2, 4, 1), p(4), None),
        (binary, y(2, 4, 3), p(4, 3, 1), None),
        (binary, y(2, 4, 3, 1), p(4, 3), None),
        (binary, y(2, 4, 1), p(4, 1), p(4, 1)),
        (binary, y(2, 4, 3, 1), p(4, 3, 1), p(4, 3)),
        (binary, y(2, 4, 3, 1), p(4, 3, 1), p(4, 3, 1)),
        (binary, y(2, 4, 3).astype(bool), p(4, 3), None),
        (binary, y(2, 4, 3), y(2, 4, 3), None),
        (dense, np.eye(5)[2], p(5), None),
        (dense, np.eye(5)[2], p(5), 2.0),
        (dense, np.eye(5, dtype=bool), p(5, 5), None),
        (dense, np.eye(5), 3 * p(5, 5), p(5)),
        (sparse, np.array(2), p(5), None),
        (sparse, y(5, 4, 1), p(4, 5), p(4)),
        (sparse, y(5, 4).astype("float32"), p(4, 5), None),
        (sparse, y(2, 4).astype(bool), p(4, 2), None),
        (sparse, y(5, 4, 2, 2, 1), p(4, 2, 2, 5), p(4, 2, 2)),
        (sparse, y(5, 4, 2, 2), p(4, 2, 2, 5), p(4, 2, 1)),
        (sparse, y(5, 4, 2, 2), p(4, 2, 2, 5), p(4, 1, 1)),
        (sparse, y(5, 4, 3), p(4, 3, 5), p(4, 3, 1)),
    ]


@fast_for("*-labels[36]-*-False", "*-labels1[0358]-*-False", "*-labels21-*-False")
@pytest.mark.parametrize("from_logits", [False, True])
@pytest.mark.parametrize("name, labels, predictions, weights", _inputs_of_keras())
def test_inputs_that_keras_takes_give_what_keras_gives(name, labels, predictions, weights, from_logits):
    theirs = getattr(keras.losses, name)(from_logits=from_logits)(labels, predictions, weights)
    ours = make(name, from_logits=from_logits)(labels, predictions, weights)
    assert_close(to_numpy(ours), to_numpy(theirs), rtol=3e-6)


@fast_for("1-1-*", "1-32769-*")
@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize("rows, classes", [(1, 1), (1, 2**15 + 1), (1, 2**18), (16, 2**16)])
def test_losses_are_accurate_for_any_number_of_classes(name, rows, classes):
    """All the others' terms are equal, so that their sum's rounding adds up as badly as it can."""
    logits = np.zeros((rows, classes), "float32")
    logits[:, -1] = 20.0
    result, gradient = run(make(name, from_logits=True, reduction="sum"), np.full(rows, classes - 1), logits)
    others = (classes - 1) * math.exp(-20.0)
    assert_close(result, rows * math.log1p(others))
    assert_close(gradient[:, -1], np.full(rows, -others / (1 + others)))
