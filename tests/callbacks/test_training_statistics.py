"""What is known of tokens and gradient, in the logs that every callback sees."""

import csv

import keras
import numpy as np
import pytest

import keras_xent as kx
from tests.callbacks.training import STEPS, data, fit, model


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
