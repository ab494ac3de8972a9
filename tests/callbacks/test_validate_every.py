"""Validation within an epoch."""

import json
import subprocess
import sys

import keras
import numpy as np
import pytest

import keras_xent as kx
from tests.backend import environment
from tests.callbacks import replicas
from tests.callbacks.logs import scalars
from tests.callbacks.training import CLASSES, LENGTH, STEPS, data, fit, model
from tests.tiers import whole


def validation():
    x, y = data()
    return x[:5], y[:5]


def trained(folder, *callbacks):
    """A model with state and randomness, its history, and what both logs hold."""
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Embedding(CLASSES, 8), keras.layers.BatchNormalization(), keras.layers.Dropout(0.3)]
    built = keras.Sequential([keras.Input((LENGTH,)), *layers, kx.layers.LogitsDense(CLASSES)])
    loss = kx.losses.MaskedSequenceCrossentropy(ignore_class=0)
    built.compile(keras.optimizers.Adam(0.05), loss, metrics=[kx.metrics.Perplexity(ignore_class=0)])
    logger = kx.callbacks.PerplexityLogger(update_freq=1)
    logs = [logger, kx.callbacks.TensorBoard(folder, update_freq=1)]
    history = fit(built, *logs, *callbacks, validation=False, shuffle=True, epochs=3)
    return built, history, logger.rows, folder


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The same training without validation, and with one every three steps."""
    validates = kx.callbacks.ValidateEvery(3, validation(), batch_size=2)
    folders = [tmp_path_factory.mktemp(name) for name in ("without", "with")]
    return trained(folders[0]), trained(folders[1], validates), validates


def test_training_is_bit_for_bit_as_without_it(pair):
    (plain, history, rows, folder), (validated, with_it, all_rows, other_folder), _ = pair
    for before, after in zip(plain.get_weights(), validated.get_weights(), strict=True):
        np.testing.assert_array_equal(before, after)
    assert history == {name: with_it[name] for name in history}
    training = [row for row in all_rows if row["kind"] != "validation"]
    numbers = [{name: value for name, value in row.items() if name != "seconds"} for row in rows]
    for row, after in zip(numbers, training, strict=True):
        assert row == {name: after[name] for name in row}
    curves, after = scalars(folder / "train"), scalars(other_folder / "train")
    assert curves.keys() == after.keys()
    assert all(curves[tag] == after[tag] for tag in curves.keys() - {"tokens/per_second"})


def test_both_logs_have_it_at_the_steps_of_training(pair):
    _, (built, _, rows, folder), validates = pair
    steps = [3, 6, 9, 12]
    assert validates.history["step"] == steps
    read = scalars(folder / "validation")
    for name in ("loss", "perplexity"):
        curve = read[f"evaluation_{name}_vs_iterations"]
        assert curve == pytest.approx(dict(zip(steps, validates.history[f"val_{name}"], strict=True)), rel=1e-6)
    nll = np.log(validates.history["val_perplexity"])
    np.testing.assert_allclose(list(read["units/nll"].values()), nll, rtol=1e-6)
    found = [row for row in rows if row["kind"] == "validation"]
    # That of step 12 is at the end of an epoch.
    assert [(row["step"], row["epoch"]) for row in found] == [(3, 0), (6, 1), (9, 2), (12, 2)]
    np.testing.assert_allclose([row["val_nll"] for row in found], nll, rtol=1e-6)
    assert {row["val_tokens"] for row in found} == {(validation()[1] != 0).sum()}
    x, y = validation()
    result = built.evaluate(x, y, batch_size=2, verbose=0, return_dict=True)
    assert validates.history["val_perplexity"][-1] == pytest.approx(result["perplexity"], rel=1e-6)


@whole
def test_the_logs_of_batches_and_epochs_have_it_for_other_callbacks(tmp_path):
    seen = []

    class Watch(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            seen.append("val_loss" in logs)

    validates = kx.callbacks.ValidateEvery(3, validation())
    path = str(tmp_path / "{val_loss:.4f}.keras")
    best = keras.callbacks.ModelCheckpoint(path, monitor="val_loss", save_freq=3, save_best_only=True)
    history = fit(model(), validates, best, Watch(), validation=False, epochs=3)
    assert seen == [(step + 1) % 3 == 0 for step in range(3 * STEPS)]
    losses = validates.history["val_loss"]
    # The last before the end of each epoch.
    assert history["val_loss"] == [losses[0], losses[1], losses[3]]
    lowest = [loss for i, loss in enumerate(losses) if loss == min(losses[: i + 1])]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(f"{loss:.4f}.keras" for loss in lowest)


def test_early_stopping_counts_validations_and_stops_within_an_epoch():
    stop = keras.callbacks.EarlyStopping("val_loss", mode="max", patience=2, restore_best_weights=True)
    validates = kx.callbacks.ValidateEvery(1, validation(), callbacks=[stop])
    built = model()
    fit(built, validates, validation=False, epochs=5)
    # The loss falls, and the first validation stays the best of those who want it to rise.
    assert validates.history["step"] == [1, 2, 3]
    x, y = validation()
    assert built.evaluate(x, y, verbose=0, return_dict=True)["loss"] == pytest.approx(validates.history["val_loss"][0])


def test_a_second_fit_and_executions_of_several_steps_continue_the_count():
    validates, built = kx.callbacks.ValidateEvery(5, validation()), model(steps_per_execution=3)
    fit(built, validates, validation=False)
    fit(built, validates, validation=False)
    # Executions end after steps 3 and 4 of each epoch of 4.
    assert validates.history["step"] == [7, 11, 15]


@whole
def test_datasets_and_their_number_of_batches_are_taken():
    import tensorflow as tf

    dataset = tf.data.Dataset.from_tensor_slices(validation()).batch(2)
    whole, part = kx.callbacks.ValidateEvery(4, dataset), kx.callbacks.ValidateEvery(4, dataset, validation_steps=1)
    built = model(rate=0.0)
    fit(built, whole, part, validation=False, epochs=1)
    for validates, rows in ((whole, slice(None)), (part, slice(2))):
        x, y = (array[rows] for array in validation())
        result = built.evaluate(x, y, verbose=0, return_dict=True)["perplexity"]
        assert validates.history["val_perplexity"] == [pytest.approx(result, rel=1e-6)]


def test_arguments_are_checked():
    with pytest.raises(ValueError) as error:
        kx.callbacks.ValidateEvery(0, validation())
    assert str(error.value) == "`steps` must be a whole number of at least 1. Received: steps=0."
    with pytest.raises(ValueError) as error:
        kx.callbacks.ValidateEvery(10, None)
    assert str(error.value) == (
        "`validation_data` must be (x, y), (x, y, sample_weight), a dataset or a generator. Received: None."
    )
    with pytest.raises(ValueError, match="must have save_freq='epoch'"):
        batches = keras.callbacks.ModelCheckpoint("model.keras", save_freq=2)
        kx.callbacks.ValidateEvery(10, validation(), callbacks=[batches])


class Noise(keras.layers.Layer):
    """Draws random numbers in validation as in training."""

    def __init__(self):
        super().__init__()
        self.seed_generator = keras.random.SeedGenerator(5)

    def call(self, hidden):
        return hidden + keras.random.normal(keras.ops.shape(hidden), seed=self.seed_generator)


def test_random_numbers_of_the_training_are_left_alone():
    def history(*callbacks):
        keras.utils.set_random_seed(0)
        built = keras.Sequential(
            [keras.Input((LENGTH,)), keras.layers.Embedding(CLASSES, 8), Noise(), kx.layers.LogitsDense(CLASSES)]
        )
        built.compile("sgd", kx.losses.MaskedSequenceCrossentropy(ignore_class=0))
        return fit(built, *callbacks, validation=False, epochs=1)["loss"]

    assert history(kx.callbacks.ValidateEvery(1, validation())) == history()


def test_states_of_recurrent_layers_are_those_of_the_training():
    def history(*callbacks):
        keras.utils.set_random_seed(0)
        tokens = keras.Input(batch_shape=(2, LENGTH))
        hidden = keras.layers.SimpleRNN(8, return_sequences=True, stateful=True)(
            keras.layers.Embedding(CLASSES, 8)(tokens)
        )
        built = keras.Model(tokens, kx.layers.LogitsDense(CLASSES)(hidden))
        built.compile("sgd", kx.losses.MaskedSequenceCrossentropy(ignore_class=0))
        return fit(built, *callbacks, validation=False, epochs=1, batch_size=2)["loss"]

    x, y = data()
    assert history(kx.callbacks.ValidateEvery(1, (x[:4], y[:4]), batch_size=2)) == history()


@whole
def test_every_validation_has_the_batches_of_a_generator():
    """A generator cannot begin again, and one that never ends would give other batches each time."""
    x, y = validation()

    def batches(is_endless):
        yield x[:2], y[:2]
        yield x[2:], y[2:]
        while is_endless:
            yield x[:1], y[:1]

    whole = kx.callbacks.ValidateEvery(2, validation(), batch_size=2)
    given = kx.callbacks.ValidateEvery(2, batches(False)), kx.callbacks.ValidateEvery(2, batches(True), None, 2)
    fit(model(), whole, *given, validation=False)
    for validates in given:
        np.testing.assert_allclose(validates.history["val_perplexity"], whole.history["val_perplexity"], rtol=1e-6)


@whole
def test_an_epoch_without_a_validation_has_no_result():
    """The one of an epoch before would be one more without an improvement."""
    stop = keras.callbacks.EarlyStopping("val_loss", patience=1)
    validates = kx.callbacks.ValidateEvery(3 * STEPS, validation())
    with pytest.warns(UserWarning, match="`val_loss` which is not available"):
        history = fit(model(), validates, stop, validation=False, epochs=6)
    assert validates.history["step"] == [3 * STEPS, 6 * STEPS]
    assert history["val_loss"] == validates.history["val_loss"] and len(history["loss"]) == 6


@whole
def test_its_callbacks_see_the_validation():
    """The averages are validated, and the training goes on with the weights."""
    average = keras.callbacks.SwapEMAWeights()
    validates = kx.callbacks.ValidateEvery(STEPS, validation(), callbacks=[average])
    built = model(rate=0.0)
    built.compile(keras.optimizers.SGD(0.5, use_ema=True, ema_momentum=0.9), built.loss)
    seen = []

    class Watch(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            moving = self.model.optimizer._model_variables_moving_average
            seen.append([keras.ops.convert_to_numpy(one) for one in moving])
            seen.append(self.model.get_weights())

    fit(built, validates, Watch(), validation=False, epochs=1)
    averages, weights = seen
    assert max(np.abs(a - w).max() for a, w in zip(averages, weights, strict=True)) > 1e-3
    built.set_weights(averages)
    x, y = validation()
    found = built.evaluate(x, y, verbose=0, return_dict=True)["loss"]
    assert validates.history["val_loss"] == [pytest.approx(found, rel=1e-5)]


@whole
def test_the_logs_of_an_interrupted_fit_are_left_alone():
    class Interrupt(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            if batch == 2:
                raise RuntimeError

    built, before, after = model(), kx.callbacks.PerplexityLogger(), kx.callbacks.PerplexityLogger()
    with pytest.raises(RuntimeError):
        fit(built, before, Interrupt(), validation=False)
    validates = kx.callbacks.ValidateEvery(2, validation())
    fit(built, after, validates, validation=False, epochs=1)
    assert before.rows == []
    assert [row["step"] for row in after.rows if row["kind"] == "validation"] == validates.history["step"] == [4, 6]


@pytest.mark.whole
def test_on_replicas_training_is_as_without_it():
    command = [sys.executable, "-m", replicas.__name__]
    done = subprocess.run(command, env=environment(KERAS_BACKEND="tensorflow"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    (history, weights), (with_it, weights_with_it) = result["runs"]
    for one, other in zip(weights, weights_with_it, strict=True):
        np.testing.assert_array_equal(one, other)
    # The metrics are put back as sums of the replicas.
    for name, values in history.items():
        np.testing.assert_allclose(with_it[name], values, rtol=1e-6)
    assert len(result["validated"]) == 2 * STEPS
    assert result["validated"][-1] == pytest.approx(result["last"], rel=1e-5)


@pytest.mark.parametrize("on_epoch", [False, True])
def test_averages_are_exchanged_without_a_trace(on_epoch):
    """On TensorFlow Keras exchanges them by sums, and keeps the averages after what it takes for the last epoch."""

    def after(*callbacks):
        built = model()
        built.compile(keras.optimizers.Adam(0.05, use_ema=True, ema_momentum=0.7), built.loss)
        validates = [kx.callbacks.ValidateEvery(2, validation(), callbacks=callbacks)] if callbacks else []
        losses = fit(built, *validates, validation=False)["loss"]
        return [*built.get_weights(), *map(keras.ops.convert_to_numpy, built.optimizer.variables), np.array(losses)]

    for plain, validated in zip(after(), after(keras.callbacks.SwapEMAWeights(on_epoch)), strict=True):
        np.testing.assert_array_equal(plain, validated)
