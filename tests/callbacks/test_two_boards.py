"""Two TensorBoard callbacks in one `fit`: each writes into its own folder, what it writes by itself."""

import keras
import pytest

import keras_xent as kx
from tests.backend import BACKEND
from tests.callbacks.logs import scalars
from tests.callbacks.training import BATCH, CLASSES, LENGTH, data, fit, model
from tests.tiers import sample, whole

RUNS = ("train", "validation")


def ours(folder, update_freq=1):
    return kx.callbacks.TensorBoard(folder, update_freq=update_freq, histogram_freq=1)


def keras_own(folder, update_freq=1):
    return keras.callbacks.TensorBoard(folder, update_freq=update_freq, write_steps_per_second=True)


def tags(folder):
    """The steps of each tag, without those that say how fast it went."""
    read = {run: scalars(folder / run) for run in RUNS}
    return {(run, tag): list(steps) for run in RUNS for tag, steps in read[run].items() if "second" not in tag}


def default_writer_is_set():
    import tensorflow as tf

    with tf.summary.record_if(True):
        return bool(tf.summary.should_record_summaries())


PAIRS = [(ours, ours), (ours, keras_own), (keras_own, ours)]


@pytest.mark.parametrize("freq", sample([1, 2, "epoch"], [1]))
@pytest.mark.parametrize("first, second", PAIRS)
def test_each_writes_into_its_own_folder_what_it_writes_alone(tmp_path, first, second, freq):
    alone = {make: tmp_path / make.__name__ for make in (first, second)}
    fit(model(), ours(alone[ours]))
    together = [first(tmp_path / "first"), second(tmp_path / "second", freq)]
    fit(model(), *together)
    expected = tags(alone[ours])
    assert ("train", "batch_loss") in expected
    for make, callback, name in zip((first, second), together, ("first", "second"), strict=True):
        read = tags(tmp_path / name)
        if make is ours and callback.update_freq == 1:
            assert read == expected
        elif make is ours:
            assert read.keys() <= expected.keys() and read["train", "epoch_loss"] == [0, 1]
        else:
            assert not any(tag.startswith(("units/", "tokens/", "optimizer/", "gap/")) for _, tag in read)
            assert not callback.update_freq == "epoch" or ("train", "batch_loss") not in read
    assert not default_writer_is_set()


@whole
@pytest.mark.parametrize("first, second", PAIRS)
def test_no_default_writer_is_left_after_an_evaluation(tmp_path, first, second):
    built, (x, y) = model(), data()[:2]
    callbacks = [first(tmp_path / "first"), second(tmp_path / "second")]
    built.evaluate(x, y, batch_size=BATCH, verbose=0, callbacks=callbacks)
    assert not default_writer_is_set()


@pytest.mark.skipif(BACKEND != "tensorflow", reason="JAX calls a layer when its step is compiled only")
def test_summaries_of_layers_go_into_one_of_two_folders(tmp_path):
    import tensorflow as tf

    class Noted(keras.layers.Layer):
        def call(self, x):
            tf.summary.scalar("noted", tf.reduce_mean(x))
            return x

    embedding = keras.layers.Embedding(CLASSES, 8)
    built = model()
    built = keras.Sequential([keras.Input((LENGTH,)), embedding, Noted(), built.layers[-1]])
    built.compile("adam", kx.losses.MaskedSequenceCrossentropy(ignore_class=0), run_eagerly=True)
    fit(built, ours(tmp_path / "first"), ours(tmp_path / "second"))
    noted = [any("noted" in tag for _, tag in tags(tmp_path / name)) for name in ("first", "second")]
    assert noted == [False, True]
