"""Which losses say that an optimizer takes the mean of means over unequal numbers of labels."""

import warnings

import keras
import numpy as np
import pytest

import keras_xent as kx
from tests.tiers import fast_for, sample

BY_NAME = {
    "binary": lambda **options: kx.losses.BinaryCrossentropy(from_logits=True, **options),
    "categorical": lambda **options: kx.losses.CategoricalCrossentropy(from_logits=True, **options),
    "fused": lambda **options: kx.losses.CategoricalCrossentropy(from_logits=True, **options),
    "distillation": lambda **options: kx.losses.Distillation(**options),
    "sparse": lambda **options: kx.losses.SparseCategoricalCrossentropy(from_logits=True, **options),
}


def warnings_of_accumulation(loss, mask=False, weights=False, run_eagerly=False, **options):
    """Sentences about a loss whose optimizer accumulates gradients itself."""
    inputs = keras.Input((2, 4))
    hidden = keras.layers.Masking()(inputs) if mask else inputs
    head = kx.layers.LogitsDense if loss == "fused" else keras.layers.Dense
    model = keras.Model(inputs, head(3)(hidden))
    optimizer = keras.optimizers.SGD(0.05, gradient_accumulation_steps=2)
    model.compile(optimizer, BY_NAME[loss](**options), run_eagerly=run_eagerly)
    targets = np.zeros((2, 2), "int32") if loss == "sparse" else np.eye(3, dtype="float32")[[[0, 1], [1, 2]]]
    weights = np.ones((2, 2), "float32") if weights else None
    x = np.random.default_rng(0).standard_normal((2, 2, 4)).astype("float32")
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        model.fit(x, targets, sample_weight=weights, batch_size=1, epochs=2, verbose=0)
    about = [one for one in found if "weigh more" in str(one.message)]
    assert all(one.filename == __file__ for one in about)
    return [str(one.message) for one in about]


MAY_DIFFER = [
    ("binary", {"mask": True}),
    ("binary", {"ignore_class": -1}),
    ("binary", {"weights": True, "reduction": "mean_with_sample_weight"}),
    ("categorical", {"mask": True, "reduction": "token_mean"}),
    ("categorical", {"weights": True, "reduction": "token_mean"}),
    ("fused", {"mask": True}),
    ("distillation", {"mask": True}),
    ("sparse", {"ignore_class": 2}),
    ("sparse", {"reduction": "token_mean", "class_weight": [1.0, 2.0, 3.0]}),
    ("sparse", {"reduction": "sequence_mean", "ignore_class": 2}),
    ("sparse", {"ignore_class": 2, "run_eagerly": True}),
    ("fused", {"mask": True, "run_eagerly": True}),
]
FAST = [("sparse", {"reduction": "sequence_mean", "ignore_class": 2}), ("fused", {"mask": True, "run_eagerly": True})]
FAST += [("binary", {"mask": True}), ("categorical", {"weights": True, "reduction": "token_mean"})]


@fast_for("sparse-*")
@pytest.mark.parametrize("loss, options", sample(MAY_DIFFER, FAST))
def test_every_loss_warns_once_of_means_of_means(loss, options):
    (message,) = warnings_of_accumulation(loss, **options)
    assert "Use keras_xent.accumulate_gradients(model, steps) on whole batches." in message


EXACT = [
    ("binary", {}),
    ("categorical", {"reduction": "token_mean"}),
    ("fused", {}),
    ("distillation", {}),
    ("sparse", {"class_weight": [1.0, 2.0, 3.0]}),
    # Weights are no part of the number of labels, and sums have no denominator.
    ("binary", {"weights": True}),
    ("categorical", {"mask": True, "reduction": "sum"}),
    ("categorical", {"reduction": "sequence_mean", "weights": True}),
]


@pytest.mark.parametrize("loss, options", sample(EXACT, [("binary", {"weights": True})]))
def test_no_loss_warns_where_the_mean_of_means_is_the_mean(loss, options):
    assert warnings_of_accumulation(loss, **options) == []


class WithClassWeights(keras.Model):
    """A model that has the class weights of its loss among its variables."""

    def __init__(self):
        super().__init__()
        self.head = keras.layers.Dense(3)
        self.class_weights = self.add_weight(shape=(3,), initializer="ones", trainable=False)

    def call(self, x):
        """Logits."""
        return self.head(x)


def test_class_weights_that_are_a_variable_are_not_read_for_the_sentence():
    model = WithClassWeights()
    loss = BY_NAME["sparse"](class_weight=model.class_weights, ignore_class=2)
    model.compile(keras.optimizers.SGD(0.05, gradient_accumulation_steps=2), loss)
    with pytest.warns(UserWarning, match="weigh more"):
        history = model.fit(np.zeros((2, 4), "float32"), np.array([0, 1]), batch_size=1, verbose=0)
    # The bias is 0, and so are the logits.
    np.testing.assert_allclose(history.history["loss"], np.log(3), rtol=1e-6)


def test_a_loss_of_keras_that_ignores_a_class_says_so_where_micro_batches_are_ours():
    model = kx.accumulate_gradients(keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)]), 2)
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=2))
    with pytest.warns(UserWarning, match="mean over the valid elements of each micro-batch"):
        model.fit(np.zeros((4, 4), "float32"), np.array([0, 1, 2, 2]), batch_size=4, verbose=0)
