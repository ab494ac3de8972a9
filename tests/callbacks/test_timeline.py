"""Epochs and steps go on where the training of a model has stopped."""

import types

import keras
import numpy as np
import pytest

from keras_xent.callbacks._timeline import Mark, Timeline, in_order

LOG = [Mark(10, 10, 0), Mark(20, 20, 1), Mark(30, 30, 2)]


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
    return timeline.mark(epoch)


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
    assert [trained(timeline, trainee, epoch, 4) for epoch in (0, 1)] == [Mark(4, 4, 0), Mark(8, 8, 1)]
    timeline.begin_fit(trainee)
    assert [trained(timeline, trainee, epoch, 4) for epoch in (0, 1)] == [Mark(12, 12, 2), Mark(16, 16, 3)]


def test_a_second_fit_goes_on_after_the_model_was_compiled_again():
    timeline, trainee = Timeline(), Model(0)
    timeline.begin_fit(trainee)
    trained(timeline, trainee, 0, 4)
    trainee.optimizer = Model(0).optimizer
    timeline.begin_fit(trainee)
    assert trained(timeline, trainee, 0, 4) == Mark(8, 4, 1)


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


def test_steps_are_batches_where_loss_scaling_skips_updates():
    """Two of the first three batches are skipped, and a backup of the end of the first epoch is restored."""
    timeline, trainee = Timeline(), Model(0)
    trainee.optimizer = types.SimpleNamespace(inner_optimizer=trainee.optimizer)
    timeline.begin_fit(trainee, batches=3)
    marks = []
    for epoch, updates in enumerate((1, 3)):
        timeline.begin_epoch(epoch, list)
        for batch in range(3):
            timeline.begin_batch(batch, "epoch")
            timeline.end_batch(batch)
        trainee.optimizer.inner_optimizer.iterations += updates
        timeline.end_batches("epoch")
        marks.append(timeline.mark(epoch))
    assert marks == [Mark(3, 1, 0), Mark(6, 4, 1)]
    trainee.optimizer.inner_optimizer.iterations = 1
    timeline.begin_fit(trainee)
    timeline.begin_epoch(1, list)
    assert (timeline.steps, timeline.number(1)) == (3, 1)
    for iterations, steps in ((4, 6), (3, 5), (1, 3), (6, 8)):
        assert begun(Timeline(), Model(iterations), 0, marks)[1] == steps


def test_steps_are_batches_where_a_batch_updates_twice():
    timeline, trainee = Timeline(), Model(0)
    timeline.begin_fit(trainee)
    timeline.begin_epoch(0, list)
    for batch in range(3):
        timeline.begin_batch(batch, "epoch")
        trainee.optimizer.iterations += 2
        timeline.end_batch(batch)
    timeline.end_batches("epoch")
    assert timeline.mark(0) == Mark(3, 6, 0)
    assert begun(Timeline(), Model(6), 0, [Mark(3, 6, 0)]) == (1, 3)


@pytest.mark.parametrize("batches", [4, None])
def test_the_steps_of_an_execution_that_was_cut_short_are_counted(batches):
    """Three steps at once, four batches, and the end of the second execution may not be reported."""
    for reported in (True, False):
        timeline, trainee = Timeline(), Model(0)
        trainee.steps_per_execution = 3
        timeline.begin_fit(trainee, batches)
        timeline.begin_epoch(0, list)
        for batch in (0, 3):
            timeline.begin_batch(batch, "epoch")
            if batch == 0 or reported:
                timeline.end_batch(batch + 2)
        trainee.optimizer.iterations = 4
        timeline.end_batches("epoch")
        assert timeline.steps == 4


def test_a_batch_that_is_reported_late_is_counted():
    timeline, trainee = Timeline(), Model(0)
    timeline.begin_fit(trainee, 2)
    timeline.begin_epoch(0, list)
    timeline.begin_batch(0, "epoch")
    timeline.end_batch(0)
    timeline.begin_batch(1, "epoch")
    trainee.optimizer.iterations = 2
    timeline.end_batches("epoch")
    assert timeline.steps == 2


def test_marks_that_were_written_again_count_once():
    first, again = Mark(10, 10, 0), [Mark(12, 11), Mark(20, 19, 1)]
    assert in_order([first, Mark(20, 20, 1), Mark(30, 30, 2), *again]) == [first, *again]
    assert in_order([Mark(10, 10), first, Mark(10, 10)]) == [first, Mark(10, 10)]


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
        assert timeline.mark(epoch) == Mark(3 * (epoch + 1), None, epoch)


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
