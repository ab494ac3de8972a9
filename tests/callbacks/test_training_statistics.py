"""What is known of tokens and gradient, in the logs that every callback sees."""

import csv
import time

import keras
import numpy as np
import pytest

import keras_xent as kx
from tests.callbacks.training import STEPS, data, fit, model
from tests.tiers import whole


@whole
def test_the_logs_of_epochs_have_it_for_callbacks_that_stand_behind(tmp_path):
    statistics = kx.callbacks.TrainingStatistics(gradient_norm=True)
    history = fit(model(), statistics, keras.callbacks.CSVLogger(tmp_path / "log.csv"))
    share = (data()[1] != 0).mean()
    assert history["valid_share"] == pytest.approx([share, share])
    assert all(rate > 0 for rate in history["tokens_per_second"])
    assert all(0 < norm < 10 for norm in history["gradient_norm"])
    with open(tmp_path / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for name in ("valid_share", "tokens_per_second", "gradient_norm"):
        assert [float(row[name]) for row in rows] == history[name]


def test_the_logs_of_batches_have_that_of_the_batches_before():
    seen = []

    class Watch(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            seen.append(logs.get("valid_share"))

    statistics = kx.callbacks.TrainingStatistics(tokens_per_second=False, update_freq=2)
    history = fit(model(), statistics, Watch(), epochs=1)
    assert "tokens_per_second" not in history and len(seen) == STEPS
    first = (data()[1][:8] != 0).mean()
    assert seen == [None, None, pytest.approx(first), pytest.approx(first)]


def test_training_is_as_without_it():
    histories = fit(model()), fit(model(), kx.callbacks.TrainingStatistics(gradient_norm=True, update_freq=1))
    assert histories[0] == {name: histories[1][name] for name in histories[0]}


def test_without_a_metric_of_tokens_it_says_what_is_missing():
    with pytest.warns(UserWarning) as warned:
        history = fit(model(metrics=[]), kx.callbacks.TrainingStatistics(gradient_norm=True))
    assert [str(w.message) for w in warned if "tokens" in str(w.message)] == [
        "No tokens will be counted, since the model has no metric that counts them. Compile it with "
        "metrics=[keras_xent.metrics.Perplexity()], or set tokens_per_second=False and valid_share=False."
    ]
    assert np.isfinite(history["gradient_norm"]).all()


@whole
def test_the_time_of_validation_is_not_that_of_training():
    class Slow(keras.utils.PyDataset):
        def __len__(self):
            return 1

        def __getitem__(self, index):
            time.sleep(0.5)
            return data()

    # In the second epoch; the first has the compilation.
    validates = kx.callbacks.ValidateEvery(2 * STEPS - 1, Slow())
    history = fit(model(), kx.callbacks.TrainingStatistics(valid_share=False), validates, validation=False)
    assert history["tokens_per_second"][1] > (data()[1] != 0).sum() / 0.5


def test_a_constant_scale_of_the_loss_is_no_part_of_the_gradient():
    def norms(scale):
        keras.utils.set_random_seed(0)
        # TensorFlow's gradient of an embedding is none that Keras can divide.
        built = keras.Sequential([keras.Input((6, 4)), kx.layers.LogitsDense(11)])
        built.compile(keras.optimizers.SGD(0.1, loss_scale_factor=scale), kx.losses.MaskedSequenceCrossentropy())
        statistics = kx.callbacks.TrainingStatistics(tokens_per_second=False, valid_share=False, gradient_norm=True)
        x, y = np.ones((8, 6, 4), "float32"), np.arange(48).reshape(8, 6) % 11
        return built.fit(x, y, epochs=2, verbose=0, callbacks=[statistics]).history["gradient_norm"]

    np.testing.assert_allclose(norms(64.0), norms(None), rtol=1e-6)
