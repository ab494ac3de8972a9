"""Epochs and steps go on where the training of a model has stopped."""

import types

import keras
import numpy as np
import pytest

from keras_xent.callbacks.timeline import Epoch, Timeline

LOG = [Epoch(0, 10), Epoch(1, 20), Epoch(2, 30)]


class Model:
    """What a timeline sees of a model that was trained for so many iterations."""

    def __init__(self, iterations):
        self.optimizer = types.SimpleNamespace(iterations=iterations)


def begun(timeline, model, epoch=0, log=()):
    timeline.begin_fit(model)
    timeline.begin_epoch(epoch, lambda: log)
    return timeline.number(epoch), timeline.steps


def trained(timeline, model, epoch, batches):
    timeline.begin_epoch(epoch, list)
    for batch in range(batches):
        timeline.begin_batch(batch, "epoch")
        timeline.end_batch(batch)
    model.optimizer.iterations += batches
    timeline.end_batches("epoch")
    return timeline.end_epoch(epoch)


def test_a_new_model_begins_at_0_whatever_is_in_the_log():
    assert begun(Timeline(), Model(0), log=LOG) == (0, 0)


@pytest.mark.parametrize(
    "iterations, initial_epoch, first",
    [
        (30, 0, 3),
        (30, 3, 3),
        (30, 7, 7),
        # Interrupted in the fourth epoch, or set back to the end of the second.
        (35, 0, 3),
        (20, 0, 2),
        (5, 0, 0),
    ],
)
def test_a_model_that_was_trained_before_goes_on_after_what_it_has_seen(iterations, initial_epoch, first):
    assert begun(Timeline(), Model(iterations), initial_epoch, LOG) == (first, iterations)


def test_a_second_fit_goes_on():
    timeline, trainee = Timeline(), Model(0)
    timeline.begin_fit(trainee)
    assert [trained(timeline, trainee, epoch, 4) for epoch in (0, 1)] == [Epoch(0, 4), Epoch(1, 8)]
    timeline.begin_fit(trainee)
    assert [trained(timeline, trainee, epoch, 4) for epoch in (0, 1)] == [Epoch(2, 12), Epoch(3, 16)]


def test_a_second_fit_goes_on_after_the_model_was_compiled_again():
    timeline, trainee = Timeline(), Model(0)
    timeline.begin_fit(trainee)
    trained(timeline, trainee, 0, 4)
    trainee.optimizer = Model(0).optimizer
    timeline.begin_fit(trainee)
    assert trained(timeline, trainee, 0, 4) == Epoch(1, 8)


def test_another_model_begins_anew():
    timeline, first, second = Timeline(), Model(0), Model(0)
    timeline.begin_fit(first)
    trained(timeline, first, 0, 4)
    assert begun(timeline, second) == (0, 0)


def test_where_gradients_are_accumulated_steps_are_batches():
    built = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    built.compile(keras.optimizers.SGD(0.1, gradient_accumulation_steps=2), "mse")
    built.fit(np.ones((5, 1)), np.ones((5, 1)), batch_size=1, verbose=0)
    assert begun(Timeline(), built) == (0, 5)


def test_a_model_without_an_optimizer_is_counted_from_outside():
    timeline, trainee = Timeline(), types.SimpleNamespace
    timeline.begin_fit(trainee)
    for epoch in (0, 1):
        timeline.begin_epoch(epoch, list)
        timeline.begin_batch(2, "epoch")
        timeline.end_batch(2)
        assert not timeline.batches_ended
        timeline.end_batches("epoch")
        assert timeline.batches_ended
        assert timeline.end_epoch(epoch) == Epoch(epoch, 3 * (epoch + 1))


@pytest.mark.parametrize("every, written", [(1, [1, 2, 3, 4, 5, 6]), (2, [2, 3, 4, 6]), (10, [3, 6]), ("epoch", [])])
def test_it_is_time_to_write_after_so_many_steps_and_at_the_end_of_an_epoch(every, written):
    timeline, trainee, steps = Timeline(), Model(0), []
    timeline.begin_fit(trainee)
    for epoch in (0, 1):
        timeline.begin_epoch(epoch, list)
        for batch in range(3):
            if timeline.begin_batch(batch, every):
                steps.append(timeline.steps)
            timeline.end_batch(batch)
        trainee.optimizer.iterations += 3
        if timeline.end_batches(every):
            steps.append(timeline.steps)
    assert steps == written
