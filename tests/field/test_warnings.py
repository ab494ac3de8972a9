"""What is warned of, on every backend, once, at the user's line."""

import re
import warnings

import keras
import numpy as np
import pytest
from keras import layers

import keras_xent as kx
from tests.tiers import fast_for, whole

rng = np.random.default_rng(0)
TOKENS = rng.integers(0, 50, (8, 6))


def told(model, loss, x, y, metrics=(), **fit):
    """The warnings of a `fit` of two epochs, which have to be about this file."""
    model.compile("sgd", loss, metrics=list(metrics))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit(x, y, verbose=0, epochs=2, **fit)
    caught = [w for w in caught if w.category is UserWarning]
    assert all(w.filename == __file__ for w in caught)
    return [str(w.message) for w in caught]


def model_of(shape, *stack):
    return keras.Sequential([keras.Input(shape), *stack])


Sparse, Binary = kx.losses.SparseCategoricalCrossentropy, kx.losses.BinaryCrossentropy
LOGITS = {
    "dense": lambda: ((8,), [layers.Dense(5, name="out")], ()),
    "reshape": lambda: ((8,), [layers.Dense(10, name="out"), layers.Reshape((2, 5))], (2,)),
    "convolution": lambda: ((6, 6, 2), [layers.Conv2D(5, 1, use_bias=False, name="out")], (6, 6)),
    "upsampling": lambda: ((6, 6, 2), [layers.Conv2D(5, 1, name="out"), layers.UpSampling2D()], (12, 12)),
    "pooling": lambda: ((6, 6, 2), [layers.Conv2D(5, 1, name="out"), layers.GlobalAveragePooling2D()], ()),
    "time": lambda: ((3, 8), [layers.TimeDistributed(layers.Dense(5, name="out"))], (3,)),
    "log_softmax": lambda: ((8,), [layers.Dense(5, activation="log_softmax", name="out")], ()),
    "inside": lambda: ((8,), [keras.Sequential([keras.Input((8,)), layers.Dense(5, name="out")])], ()),
}


@fast_for("dense", "inside")
@pytest.mark.parametrize("name", LOGITS)
def test_a_forgotten_from_logits_is_told(name):
    shape, stack, labels = LOGITS[name]()
    model = model_of(shape, *stack)
    x, y = rng.normal(size=(4, *shape)).astype("float32"), rng.integers(0, 5, (4, *labels))
    (message,) = told(model, Sparse(), x, y)
    assert message.startswith("SparseCategoricalCrossentropy has from_logits=False, but the output of layer 'out' is ")


class Subclassed(keras.Model):
    """A model that does not name its output."""

    def __init__(self, activation):
        super().__init__()
        self.out = layers.Dense(5, activation, name="out")

    def call(self, inputs):
        return self.out(inputs)


@fast_for("None-sigmoid-inside", "softmax-softmax-model")
@pytest.mark.parametrize("last", [False, True], ids=["model", "inside"])
@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
@pytest.mark.parametrize("activation", [None, "softmax", "sigmoid"])
def test_the_end_of_a_subclassed_model_is_told(activation, loss, last):
    x, y = rng.normal(size=(4, 8)).astype("float32"), rng.integers(0, 2, (4, 5))
    kind = Binary if loss == "sigmoid" else kx.losses.CategoricalCrossentropy
    model = Subclassed(activation)
    model = model_of((8,), model) if last else model
    (message,) = told(model, kind(from_logits=activation is not None), x, y)
    wrong = "has from_logits=False, but the output of layer 'out' is a matrix product"
    assert (wrong if activation is None else f"from_logits=True, but layer 'out' ends in a {activation}.") in message
    assert told(model, kind(from_logits=activation is None), x, y) == []


def test_targets_below_0_are_told():
    x, y = rng.normal(size=(2, 4, 5)).astype("float32")
    loss = kx.losses.CategoricalCrossentropy(from_logits=True)
    (message,) = told(model_of((5,), layers.Dense(5)), loss, x, y)
    assert f"was given targets down to {y.min():.4g}, and distributions are not below 0" in message
    with pytest.warns(UserWarning, match="If they are the logits of a teacher, use keras_xent.losses.Distillation"):
        kx.losses.CategoricalCrossentropy(from_logits=True)(y, x)


def test_a_forgotten_from_logits_of_one_filter_is_told():
    x, y = rng.normal(size=(4, 6, 6, 2)).astype("float32"), rng.integers(0, 2, (4, 6, 6, 1))
    (message,) = told(model_of((6, 6, 2), layers.Conv2D(1, 1, name="out")), Binary(), x, y)
    assert "from_logits=False, but the output of layer 'out' is a matrix product" in message


class Mixture(layers.Layer):
    def call(self, inputs):
        return keras.ops.matmul(inputs, keras.ops.full((5, 5), 0.2))


@pytest.mark.parametrize("last", [Mixture, lambda: layers.Dense(5, use_bias=False, kernel_initializer="identity")])
def test_a_product_of_probabilities_is_no_false_alarm(last):
    x, y = rng.normal(size=(4, 8)).astype("float32"), rng.integers(0, 5, 4)
    assert told(model_of((8,), layers.Dense(5, activation="softmax"), last()), Sparse(), x, y) == []


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_an_activation_before_from_logits_is_told(activation):
    x, y = rng.normal(size=(4, 8)).astype("float32"), rng.integers(0, 2, (4, 5))
    model = model_of((8,), layers.Dense(5, activation=activation, name="out"))
    loss = Binary(from_logits=True) if activation == "sigmoid" else kx.losses.CategoricalCrossentropy(from_logits=True)
    (message,) = told(model, loss, x, y)
    assert f"has from_logits=True, but layer 'out' ends in a {activation}." in message
    assert "uses the logits before it" in message


CHANGES = {
    "scaled": (lambda z: z * 0.5, TOKENS),
    "sliced": (lambda z: z[:, :-1], TOKENS[:, 1:]),
    "folded": (lambda z: layers.Reshape((2, 3, 50))(z), TOKENS.reshape(8, 2, 3)),
    "cropped": (lambda z: layers.Cropping1D((1, 0))(z), TOKENS[:, 1:]),
}


@fast_for("sliced", "scaled")
@pytest.mark.parametrize("name", CHANGES)
def test_logits_that_are_materialized_after_all_are_told(name):
    change, labels = CHANGES[name]
    x = keras.Input((6,))
    model = keras.Model(x, change(kx.layers.LogitsDense(50, name="head")(layers.Embedding(50, 8)(x))))
    (message,) = told(model, kx.losses.MaskedSequenceCrossentropy(), TOKENS, labels)
    assert "materializes the logits of layer 'head'" in message


@whole
def test_class_weight_of_fit_on_tokens_is_told():
    weights = {i: 1.0 + i for i in range(50)}
    model = model_of((6,), layers.Embedding(50, 8), layers.Dense(50))
    (message,) = told(model, kx.losses.MaskedSequenceCrossentropy(), TOKENS, TOKENS, class_weight=weights)
    assert message.startswith("`class_weight` of `fit` is wrong for labels of shape") and "`class_weight`" in message
    model = model_of((6,), layers.Embedding(50, 8), kx.layers.LogitsDense(50))
    assert len(told(model, Sparse(from_logits=True), TOKENS, TOKENS, class_weight=weights)) == 1
    # One label to an example is what it is for.
    x, y = rng.normal(size=(4, 8)).astype("float32"), rng.integers(0, 5, 4)
    assert told(model_of((8,), layers.Dense(5)), Sparse(from_logits=True), x, y, class_weight=weights) == []
    many = rng.integers(0, 2, (4, 5))
    (message,) = told(model_of((8,), layers.Dense(5)), Binary(from_logits=True), x, many, class_weight=weights)
    assert "pos_weight" in message


def test_a_sparse_loss_of_one_unit_is_told_of_the_binary_one():
    x, y = rng.normal(size=(4, 8)).astype("float32"), np.zeros(4, int)
    (message,) = told(model_of((8,), layers.Dense(1)), Sparse(from_logits=True), x, y)
    assert "use BinaryCrossentropy" in message
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="use the binary loss, BinaryCrossentropy"):
        Sparse(from_logits=True)(np.array([1]), np.array([[0.5]], "float32"))


@whole
def test_one_hot_rows_of_255_are_told():
    x, y = rng.normal(size=(4, 8)).astype("float32"), 255 * np.eye(5)[rng.integers(0, 5, 4)]
    loss = kx.losses.CategoricalCrossentropy(from_logits=True)
    (message,) = told(model_of((8,), layers.Dense(5)), loss, x, y)
    assert "sum to 255" in message
    with pytest.warns(UserWarning, match="sum to 255"):
        kx.losses.CategoricalCrossentropy(from_logits=True)(y, np.zeros((4, 5), "float32"))


@pytest.mark.parametrize(
    "kind, wrong, right",
    [
        (Sparse, "ignore_index", "ignore_class"),
        (kx.losses.MaskedSequenceCrossentropy, "padding_idx", "ignore_class"),
        (kx.metrics.Perplexity, "ignore_index", "ignore_class"),
        (Sparse, "weight", "class_weight"),
        (Binary, "gamma", "focal_gamma"),
        (kx.losses.sparse_categorical_crossentropy, "target", "y_true"),
        (kx.kernels.sparse_softmax_cross_entropy, "ignore_index", "ignore_class"),
        (kx.kernels.linear_cross_entropy, "softcap", "logit_softcap"),
        (kx.kernels.linear_cross_entropy, "sample_weight", "token_weights"),
        (kx.metrics.CalibrationError, "n_bins", "bins"),
        (kx.preference.dpo, "ref_chosen_logps", "reference_chosen_logps"),
        (kx.preference.simpo, "simpo_gamma", "gamma"),
        (kx.preference.grpo, "epsilon_low", "epsilon"),
        (kx.sequence_log_probs, "average_log_prob", "normalize"),
        (kx.calibrate, "ignore_index", "ignore_class"),
        (kx.distillation.LogitsDistillation, "loss", "divergence"),
    ],
)
def test_the_argument_names_of_other_libraries_are_translated(kind, wrong, right):
    sentence = rf"^{kind.__name__}(\(\))? has no argument `{wrong}`: it is called `{right}` here.$"
    with pytest.raises(TypeError, match=sentence):
        kind(**{wrong: 1})


@pytest.mark.parametrize(
    "kind, wrong, advice",
    [
        (Sparse, "pos_weight", "It belongs to the losses of binary labels; for weights of classes give `class_weight`"),
        (kx.losses.CategoricalCrossentropy, "ignore_index", "A row of zeros in the targets has no loss"),
        (Binary, "weight", "Give `pos_weight` to a loss of binary labels, or `sample_weight` where the loss is called"),
        (Sparse, "num_classes", "The number of classes is the size of the class axis of `y_pred`"),
        (Sparse, "label_smothing", "Did you mean `label_smoothing`?"),
        (kx.preference.kto, "loss_type", "Each loss of `keras_xent.preference` is a function of its own"),
        (kx.kernels.linear_cross_entropy, "shift", "Give labels without the first token"),
        (kx.metrics.Perplexity, "base", "It has: from_logits, ignore_class, axis, name, dtype"),
    ],
)
def test_an_argument_that_a_class_does_not_have_gets_advice(kind, wrong, advice):
    name = kind.__name__ if isinstance(kind, type) else f"{kind.__name__}()"
    with pytest.raises(TypeError, match=f"^{re.escape(name)} has no argument `{wrong}`. {re.escape(advice)}"):
        kind(**{wrong: 1})


def test_a_subclass_may_keep_an_argument_of_any_name():
    class Kept(Sparse):
        def __init__(self, **kwargs):
            self.weight = kwargs.pop("weight")
            super().__init__(**kwargs)

    assert Kept(weight=2.0, from_logits=True).weight == 2.0


def test_swapped_arguments_are_told():
    logits, labels = np.array([[2.0, -1.0, 7.0]], "float32"), np.array([1])
    for loss in Sparse(from_logits=True), kx.losses.MaskedSequenceCrossentropy():
        with pytest.raises(ValueError, match="^`y_true` and `y_pred` seem to be swapped"):
            loss(logits, labels)
    logits, labels = np.array([[2.0, -1.0, 7.0]], "float32"), np.array([[0, 1, 0]])
    for loss in Binary(from_logits=True), kx.losses.CategoricalCrossentropy(from_logits=True):
        for one in labels, labels.astype("float32"):
            with pytest.raises(ValueError, match="^`y_true` and `y_pred` seem to be swapped"):
                loss(logits, one)


def test_a_metric_or_a_class_given_as_a_loss_is_told():
    x, y = rng.normal(size=(4, 8)).astype("float32"), rng.integers(0, 5, 4)
    model = model_of((8,), layers.Dense(5))
    model.compile("sgd", kx.metrics.Perplexity())
    with pytest.raises(TypeError, match="Perplexity is a metric and has no gradient, and it was given as a loss"):
        model.fit(x, y, verbose=0)
    with pytest.raises(TypeError, match="SparseCategoricalCrossentropy is a class, and its arguments are options"):
        Sparse(y, x)


def test_what_is_not_there_says_where_it_is():
    with pytest.raises(AttributeError, match="Keras has it. Use `keras.losses.MeanSquaredError`"):
        kx.losses.MeanSquaredError  # noqa: B018
    with pytest.raises(AttributeError, match="Use `keras.callbacks.EarlyStopping`"):
        kx.callbacks.EarlyStopping  # noqa: B018
    with pytest.raises(AttributeError, match="^module 'keras_xent.metrics' has no attribute 'nothing'.$"):
        kx.metrics.nothing  # noqa: B018


def test_arguments_are_shown():
    loss = kx.losses.MaskedSequenceCrossentropy(ignore_class=0, label_smoothing=0.1)
    assert repr(loss) == (
        "MaskedSequenceCrossentropy(from_logits=True, ignore_class=0, label_smoothing=0.1, reduction='token_mean')"
    )
    assert repr(kx.metrics.Perplexity(ignore_class=0)) == "Perplexity(from_logits=True, ignore_class=0)"


def test_integer_labels_for_a_dense_loss_are_no_targets_whose_sum_is_too_large():
    """An array given to `fit`, whose labels sum to more than 100."""
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(20)])
    model.compile("sgd", kx.losses.CategoricalCrossentropy(from_logits=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with pytest.raises(ValueError, match="For integer labels use SparseCategoricalCrossentropy"):
            model.fit(np.ones((16, 3)), np.full(16, 19), verbose=0)
