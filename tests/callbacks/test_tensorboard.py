"""What TensorBoard reads back is what the run printed."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import keras_xent as kx


def scalars(folder):
    events = EventAccumulator(str(folder), size_guidance={"tensors": 0}).Reload()
    return {
        tag: {event.step: tf.make_ndarray(event.tensor_proto).item() for event in events.Tensors(tag)}
        for tag in events.Tags()["tensors"]
        if events.SummaryMetadata(tag).plugin_data.plugin_name == "scalars"
    }


def fitted(folder, metrics):
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((12, 5, 4)).astype("float32"), rng.integers(0, 6, (12, 5))
    inputs = keras.Input((5, 4))
    model = keras.Model(inputs, keras.layers.Dense(6)(inputs))
    model.compile("adam", kx.losses.MaskedSequenceCrossentropy(), weighted_metrics=metrics)
    callback = kx.callbacks.TensorBoard(folder)
    return model.fit(x, y, epochs=3, validation_data=(x[:4], y[:4]), verbose=0, callbacks=[callback]).history


def test_perplexity_is_logged_for_train_and_validation(tmp_path):
    history = fitted(tmp_path, [kx.metrics.Perplexity()])
    for run, prefix in (("train", ""), ("validation", "val_")):
        read = scalars(tmp_path / run)
        for epoch, perplexity in enumerate(history[f"{prefix}perplexity"]):
            np.testing.assert_allclose(read["epoch_perplexity"][epoch], perplexity, rtol=1e-6)
            np.testing.assert_allclose(read["epoch_nll"][epoch], np.log(perplexity), rtol=1e-6)
            np.testing.assert_allclose(read["epoch_bits_per_token"][epoch], np.log2(perplexity), rtol=1e-6)
        assert list(read["epoch_perplexity"]) == [0, 1, 2]


@pytest.mark.parametrize("metrics", [[], [kx.metrics.Perplexity(name="ppl")]], ids=["none", "another name"])
def test_without_the_metric_it_says_once_what_is_missing(tmp_path, metrics):
    with pytest.warns(UserWarning) as warned:
        fitted(tmp_path, metrics)
    ours = [(str(w.message), w.filename) for w in warned if "perplexity" in str(w.message)]
    sentence = (
        "No perplexity will be logged, since no metric of the model has a name that ends in 'perplexity'. Compile it "
        "with metrics=[keras_xent.metrics.Perplexity()], whose name is that unless you give another."
    )
    assert ours == [(sentence, __file__)]
    assert "epoch_loss" in scalars(tmp_path / "train")


def test_all_arguments_of_keras_are_taken(tmp_path):
    callback = kx.callbacks.TensorBoard(tmp_path, histogram_freq=1, update_freq=2, write_steps_per_second=True)
    assert isinstance(callback, keras.callbacks.TensorBoard)
    assert (callback.histogram_freq, callback.update_freq, callback.write_steps_per_second) == (1, 2, True)
