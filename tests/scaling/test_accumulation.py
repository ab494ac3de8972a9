"""Gradient accumulation on uneven tokens: the weights are those of whole batches."""

import warnings

import keras
import numpy as np
import pytest
from keras import ops

import keras_xent as kx
from tests.backend import BACKEND
from tests.scaling.training import ALL_OPTIONS, CLASSES, TOKENS, data
from tests.tiers import sample, whole

BATCH, LAST = 4, 3
SGD, ADAM = keras.optimizers.SGD, keras.optimizers.Adam


def features(rows):
    """In place of an embedding, whose gradient Keras' Adam squares place by place on TensorFlow."""
    return np.random.default_rng(0).standard_normal((rows, TOKENS, 4)).astype("float32")


def model_of(head=kx.layers.LogitsDense):
    keras.utils.set_random_seed(3)
    hidden = keras.layers.Dense(8, "tanh", kernel_regularizer=keras.regularizers.L2(0.01))
    return keras.Sequential([keras.Input((TOKENS, 4)), hidden, head(CLASSES)])


def trained(steps, optimizer=SGD, head=kx.layers.LogitsDense, model=None, weighted=False, **options):
    """Weights and history; rows of 12, 2, 7, ... valid tokens, batches without any, and a last one of three rows."""
    options = {"loss": kx.losses.MaskedSequenceCrossentropy(ignore_class=0), **options}
    _, labels, weights = data(LAST)
    model = model_of(head) if model is None else model
    model.compile(optimizer(0.05), metrics=[kx.metrics.Perplexity(ignore_class=0)], **options)
    model = kx.accumulate_gradients(model, steps)
    rows = {"batch_size": BATCH, "epochs": 2, "shuffle": False, "verbose": 0}
    weights = weights if weighted else None
    history = model.fit(features(len(labels)), labels, sample_weight=weights, **rows).history
    assert int(ops.convert_to_numpy(model.optimizer.iterations)) == 2 * 5
    return model.get_weights(), history


def distance(ours, theirs):
    return max(np.abs(a - b).max() for a, b in zip(ours, theirs, strict=True))


def assert_same(accumulated, expected):
    assert distance(accumulated[0], expected[0]) < 1e-6
    assert accumulated[1].keys() == expected[1].keys()
    for name, value in expected[1].items():
        np.testing.assert_allclose(accumulated[1][name], value, rtol=2e-6)


CASES = [(o, h) for o in (SGD, ADAM) for h in (kx.layers.LogitsDense, keras.layers.Dense)]


@pytest.mark.parametrize("optimizer, head", sample(CASES, [(ADAM, kx.layers.LogitsDense)]))
def test_micro_batches_train_as_whole_batches(optimizer, head):
    # The last three rows are three micro-batches.
    assert_same(trained(4, optimizer, head), trained(1, optimizer, head))


class TrainingLoss(keras.layers.Layer):
    """Adds a loss of its own in training only, as heads of multi-token prediction do."""

    def __init__(self):
        super().__init__()
        self.loss = kx.losses.MaskedSequenceCrossentropy(ignore_class=1)

    def call(self, inputs, training=False):
        hidden, x = inputs
        if training:
            self.add_loss(self.loss(ops.argmax(x, axis=-1), hidden))
        return hidden


def test_losses_that_layers_add_in_training_only_have_their_own_denominator():
    def model():
        keras.utils.set_random_seed(3)
        inputs = keras.Input((TOKENS, 4))
        hidden = TrainingLoss()([keras.layers.Dense(8, "tanh")(inputs), inputs])
        return keras.Model(inputs, kx.layers.LogitsDense(CLASSES)(hidden))

    assert_same(trained(4, model=model()), trained(1, model=model()))


@whole
def test_micro_batches_of_unequal_sizes():
    # Four rows in two micro-batches of two; the last three in one of two and one of one.
    assert_same(trained(2), trained(1))
    # Two of two, although there may be three; the last three in three of one.
    assert_same(trained(3), trained(1))


LOSSES = {
    "all options": {"ignore_class": 0, **ALL_OPTIONS},
    "sequence_mean": {"ignore_class": 0, "reduction": "sequence_mean"},
    "sum": {"ignore_class": 0, "reduction": "sum"},
    "sum_over_batch_size": {"ignore_class": 0, "reduction": "sum_over_batch_size"},
    "mean_with_sample_weight": {"ignore_class": 0, "reduction": "mean_with_sample_weight"},
    "normalizer": {"ignore_class": 0, "normalizer": 11.0},
}


@pytest.mark.filterwarnings("ignore:Perplexity has logit_softcap")
@whole
@pytest.mark.parametrize("name", LOSSES)
def test_every_reduction_is_that_of_the_whole_batch(name):
    loss = kx.losses.MaskedSequenceCrossentropy(**LOSSES[name])
    assert_same(trained(3, loss=loss, weighted=True), trained(1, loss=loss, weighted=True))


MODES = {"XLA": {"jit_compile": True}, "eager": {"run_eagerly": True}, "two steps": {"steps_per_execution": 2}}


@whole
@pytest.mark.parametrize("mode", MODES)
def test_it_is_the_same_in_every_mode(mode):
    assert_same(trained(4, **MODES[mode]), trained(1))


def two_outputs():
    """Tokens with the mask of an embedding, and a few labels of each sequence, some of which are missing."""
    keras.utils.set_random_seed(5)
    tokens = keras.Input((TOKENS,), dtype="int32")
    hidden = keras.layers.Embedding(CLASSES, 8, mask_zero=True)(tokens)
    topics = keras.layers.Dense(3, name="topics")(ops.mean(hidden, axis=1))
    return keras.Model(tokens, {"tokens": kx.layers.LogitsDense(CLASSES, name="tokens")(hidden), "topics": topics})


@whole
@pytest.mark.parametrize("weighted", [False, True])
def test_each_of_several_outputs_has_its_own_denominator(weighted):
    tokens, labels, weights = data(LAST)
    topics = np.random.default_rng(6).integers(-1, 2, (len(tokens), 3)).astype("float32")

    def weights_after(steps):
        model = two_outputs()
        losses = {
            "tokens": kx.losses.MaskedSequenceCrossentropy(),
            "topics": kx.losses.BinaryCrossentropy(from_logits=True, ignore_class=-1),
        }
        model.compile(SGD(0.5), losses, loss_weights={"tokens": 1.0, "topics": 0.3})
        model = kx.accumulate_gradients(model, steps)
        given = {"tokens": weights, "topics": weights[::-1].copy()} if weighted else None
        y = {"tokens": labels, "topics": topics}
        rows = {"batch_size": BATCH, "epochs": 2, "shuffle": False, "verbose": 0}
        return model.get_weights(), model.fit(tokens, y, sample_weight=given, **rows).history, model.get_weights()

    before, expected_history, expected = weights_after(1)
    _, history, accumulated = weights_after(4)
    assert distance(expected, before) > 1e-2
    # The losses of the outputs are logged as means of micro-batches, of which the last batch has one less.
    assert_same((accumulated, {"loss": history["loss"]}), (expected, {"loss": expected_history["loss"]}))


@whole
@pytest.mark.parametrize(
    "loss",
    [
        kx.losses.CategoricalCrossentropy(from_logits=True, reduction="token_mean"),
        kx.losses.Distillation(reduction="token_mean"),
        keras.losses.CategoricalCrossentropy(from_logits=True),
        kx.losses.BinaryCrossentropy(from_logits=True, reduction="token_mean"),
    ],
    ids=lambda loss: f"{type(loss).__module__.split('.')[0]} {type(loss).__name__}",
)
def test_dense_targets(loss):
    _, labels, weights = data(LAST)
    targets = np.eye(CLASSES, dtype="float32")[labels] * np.where(labels > 20, 0.0, 1.0)[..., None]

    def after(steps):
        model = kx.accumulate_gradients(model_of(), steps)
        model.compile(SGD(0.05), loss)
        # Keras' loss takes no weight of a sequence for losses of its tokens.
        weight = weights if type(loss).__module__.startswith("keras_xent") else None
        rows = {"batch_size": BATCH, "sample_weight": weight, "shuffle": False, "verbose": 0}
        history = model.fit(features(len(labels)), targets, **rows).history
        return model.get_weights(), history

    assert_same(after(4), after(1))


@whole
def test_a_scaled_loss_is_scaled_once_a_batch():
    def scaling(rate):
        return keras.optimizers.LossScaleOptimizer(SGD(rate), initial_scale=2.0**10, dynamic_growth_steps=4)

    assert_same(trained(4, scaling), trained(1, scaling))


@whole
def test_keras_takes_the_mean_of_unequal_means_and_the_loss_says_so():
    expected, _ = trained(1)
    model = model_of()
    model.compile(SGD(0.05, gradient_accumulation_steps=4), kx.losses.MaskedSequenceCrossentropy(ignore_class=0))
    _, labels, _ = data(LAST)
    with pytest.warns(UserWarning, match=r"tokens of short micro-batches weigh more.*accumulate_gradients"):
        model.fit(features(len(labels)), labels, batch_size=1, epochs=2, shuffle=False, verbose=0)
    assert distance(model.get_weights(), expected) > 1e-2


@pytest.mark.whole
def test_a_fixed_normalizer_is_the_same_in_parts_and_whole():
    """Micro-batches that the optimizer accumulates: a fixed number of tokens for all."""
    whole_batches = trained(1, loss=kx.losses.MaskedSequenceCrossentropy(ignore_class=0, normalizer=12.0))
    _, labels, _ = data()
    model = model_of()
    loss = kx.losses.MaskedSequenceCrossentropy(ignore_class=0, normalizer=12.0 / BATCH)
    model.compile(SGD(0.05, gradient_accumulation_steps=BATCH), loss)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.fit(features(len(labels))[:16], labels[:16], batch_size=1, shuffle=False, verbose=0)
    other = model_of()
    other.compile(SGD(0.05), kx.losses.MaskedSequenceCrossentropy(ignore_class=0, normalizer=12.0))
    other.fit(features(len(labels))[:16], labels[:16], batch_size=BATCH, shuffle=False, verbose=0)
    assert distance(model.get_weights(), other.get_weights()) < 1e-6
    assert distance(whole_batches[0], other.get_weights()) > 1e-3


def test_counting_computes_nothing_of_the_model(monkeypatch):
    """Each micro-batch is computed once: the mask of the whole batch costs no pass over it."""
    calls = []

    def counted(x):
        calls.append(len(x))
        return x

    def layer(x):
        if BACKEND == "tensorflow":
            import tensorflow as tf

            return tf.ensure_shape(tf.numpy_function(counted, [x], "float32", stateful=False), x.shape)
        import jax

        return jax.pure_callback(counted, jax.ShapeDtypeStruct(x.shape, x.dtype), jax.lax.stop_gradient(x))

    model = keras.Sequential([keras.Input((TOKENS, 4)), keras.layers.Lambda(layer), kx.layers.LogitsDense(CLASSES)])
    model.compile(SGD(0.05), kx.losses.MaskedSequenceCrossentropy(ignore_class=0))
    model = kx.accumulate_gradients(model, 4)
    labels = data()[1][:8]
    model.fit(features(8), labels, batch_size=8, verbose=0)
    assert calls == [2] * 4


def test_steps_can_be_changed_and_taken_back():
    model = model_of()
    plain = type(model).train_step
    assert kx.accumulate_gradients(kx.accumulate_gradients(model, 2), 3) is model
    assert model.train_step.accumulates.__func__ is plain
    assert model.train_step.accumulates.__self__ is model
    assert kx.accumulate_gradients(model, 1).train_step.__func__ is plain


class Own(kx.losses.MaskedSequenceCrossentropy):
    """A user's subclass of a loss."""


class OwnCall(kx.losses.MaskedSequenceCrossentropy):
    """One with a formula of its own."""

    def call(self, y_true, y_pred):
        return 2.0 * super().call(y_true, y_pred)


@pytest.mark.parametrize("kind", sample([Own, OwnCall], [Own]))
def test_a_subclass_of_a_loss_counts_as_the_loss_does(kind):
    accumulated, whole_batches = (trained(steps, loss=kind(ignore_class=0)) for steps in (4, 1))
    assert_same(accumulated, whole_batches)


def test_what_cannot_be_exact_is_an_error():
    model, labels = model_of(), data()[1]
    for steps in 0, 1.5, float("inf"):
        with pytest.raises(ValueError, match="`steps` must be a whole number of at least 1"):
            kx.accumulate_gradients(model, steps)
    with pytest.raises(ValueError, match="`model` must be a Keras model"):
        kx.accumulate_gradients(SGD(0.1, gradient_accumulation_steps=2), 4)
    kx.accumulate_gradients(model, 2)
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="sum"))
    with pytest.raises(ValueError, match="must have reduction='sum_over_batch_size'"):
        model.fit(features(len(labels)), labels, verbose=0)


def _accumulating_optimizers():
    """Optimizers that accumulate, alone and inside of others; Keras before 3.15 has none for groups of weights."""
    optimizers = keras.optimizers
    yield SGD(0.1, gradient_accumulation_steps=2)
    yield optimizers.LossScaleOptimizer(SGD(0.1, gradient_accumulation_steps=2))
    if hasattr(optimizers, "MultiOptimizer"):
        some = optimizers.OptimizerMap(SGD(0.1), {"nothing": SGD(0.1, gradient_accumulation_steps=2)})
        yield optimizers.LossScaleOptimizer(optimizers.MultiOptimizer(some))


def test_an_optimizer_that_accumulates_itself_is_an_error():
    labels = data()[1]
    for optimizer in _accumulating_optimizers():
        model = kx.accumulate_gradients(model_of(), 2)
        model.compile(optimizer, kx.losses.MaskedSequenceCrossentropy())
        with pytest.raises(ValueError, match="must not accumulate too.*gradient_accumulation_steps=2"):
            model.fit(features(len(labels)), labels, verbose=0)


@whole
def test_a_loss_of_keras_for_an_output_with_a_mask_warns():
    model = keras.Sequential([keras.Input((TOKENS,)), keras.layers.Embedding(CLASSES, 4, mask_zero=True)])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    tokens = data()[0][:4]
    with pytest.warns(UserWarning, match="mean over the valid elements of each micro-batch"):
        kx.accumulate_gradients(model, 2).fit(tokens, tokens % 4, verbose=0)


def test_what_ones_own_code_makes_of_losses_without_a_reduction_warns():
    class Summed(keras.Model):
        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
            losses = kx.losses.SparseCategoricalCrossentropy(from_logits=True, reduction=None)(y, y_pred)
            return ops.sum(losses, axis=0)

    inputs = keras.Input((3,))
    model = Summed(inputs, keras.layers.Dense(CLASSES)(inputs))
    model.compile("sgd")
    with pytest.warns(UserWarning, match="reduction=None is not counted") as caught:
        kx.accumulate_gradients(model, 2).fit(np.ones((4, 3)), np.arange(4) % CLASSES, verbose=0)
    assert caught[0].filename == __file__
