"""Numbers of epochs and steps that continue over several calls of `fit`, and in a new process."""

import weakref
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from keras_xent._backend import to_numpy
from keras_xent._keras import batches_seen, training_state


class Mark(NamedTuple):
    """A place on the timeline: the steps so far, the optimizer's own count at that time, the epoch that ended there."""

    step: int
    iterations: int | None
    epoch: int | None = None


class Timeline:
    """Counts batches, and continues where the training of a model has stopped.

    Keras begins each call of `fit` with epoch 0 unless it is given `initial_epoch`. The optimizer's count is saved with
    the model, but it is no count of batches: loss scaling skips some, and a model may update twice for one batch. So
    steps are counted here, and marks tie them to the optimizer's count. The marks are in the logs. A model that was
    loaded, or set back to a backup, is found between them.
    """

    def __init__(self) -> None:
        self._model: Callable[[], Any] = lambda: None
        self._optimizer: Any = None
        self._marks: list[Mark] = []
        self._resuming = True
        self._shift = 0
        self._steps_before_epoch = 0
        self._count_before_epoch: int | None = None
        # Batches of the epoch: how many there will be, of how many an execution consists, and the last ones.
        self._batches: int | None = None
        self._per_execution = 1
        self._last_begun: int | None = None
        self._ended = 0
        # Steps that have begun, and after `end_batches` all of them; and those of which something was written.
        self.steps = self._written = 0
        self.batches_ended = False

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy has no model, and counts anew.
        return Timeline, ()

    def begin_fit(self, model: Any, batches: int | None = None) -> None:
        """`fit` begins with a model that may have been trained before, and with so many batches in an epoch."""
        optimizer = getattr(model, "optimizer", None)
        # Where an outer optimizer scales the loss, the inner one counts.
        optimizer = getattr(optimizer, "inner_optimizer", optimizer)
        if self._model() is not model:
            self._marks, self.steps = [], 0
        elif optimizer is not self._optimizer:
            # The count of the new optimizer begins at 0.
            self._marks = [mark._replace(iterations=0) for mark in [*self._marks, Mark(self.steps, 0)]]
        self._model, self._optimizer = weakref.ref(model), optimizer
        self._batches, self._per_execution = batches, getattr(model, "steps_per_execution", 1) or 1
        self._resuming = True

    def begin_epoch(self, epoch: int, read_marks: Callable[[], Iterable[Mark]]) -> None:
        """An epoch begins. `read_marks` gives what an earlier process has written of the training that continues."""
        self.batches_ended, self._last_begun, self._ended = False, None, 0
        self._count_before_epoch = self._optimizer_count()
        # Not when `fit` begins: another callback may read a backup there.
        if self._resuming:
            self._resume(epoch, self._count_before_epoch, read_marks)
        self._written = self._steps_before_epoch = self.steps

    def _resume(self, epoch, iterations, read_marks):
        self._resuming = False
        if iterations is not None:
            known = self._marks or (in_order(read_marks()) if iterations else [])
            # What came after the checkpoint that is trained on will come again.
            self._marks = [mark for mark in known if mark.iterations is not None and mark.iterations <= iterations]
            last = self._marks[-1] if self._marks else Mark(0, 0)
            self.steps = last.step + iterations - last.iterations
        following = max((mark.epoch + 1 for mark in self._marks if mark.epoch is not None), default=0)
        self._shift = max(0, following - epoch)

    def number(self, epoch: int) -> int:
        """The number of Keras' epoch on this timeline."""
        return epoch + self._shift

    def step_after(self, batch: int) -> int:
        """The number of steps after a batch of this epoch."""
        return self._steps_before_epoch + min(batch + 1, self._batches or batch + 1)

    def begin_batch(self, batch: int, every: Any) -> bool:
        """A batch begins, `batch` batches after the beginning of the epoch. Whether those before are to be written.

        `every` is after how many steps something is to be written, or "epoch".
        """
        self.steps, self._last_begun = self._steps_before_epoch + batch, batch
        return every != "epoch" and self._written // every != self.steps // every and self._write()

    def end_batch(self, batch: int) -> None:
        """A batch has ended; where several steps are executed at once, the last of those."""
        self._ended = batch + 1

    def end_batches(self, every: Any) -> bool:
        """The batches of the epoch have ended. Whether some are still to be written. Waits for the device."""
        self.batches_ended = True
        self.steps = self._steps_before_epoch + self._count_batches()
        return every != "epoch" and self.steps > self._written and self._write()

    def mark(self, epoch: int | None = None) -> Mark:
        """The place that was reached, with Keras' number of the epoch that has ended, if one has."""
        if epoch is not None:
            # By now Keras has reported the end of every batch.
            self.steps = self._steps_before_epoch + self._count_batches()
        mark = Mark(self.steps, self._optimizer_count(), None if epoch is None else self.number(epoch))
        before = self._marks[-1] if self._marks else Mark(0, 0)
        # Between two marks all steps count.
        is_counted = None not in (mark.iterations, before.iterations)
        if epoch is not None or is_counted and _skipped(mark) != _skipped(before):
            self._marks.append(mark)
        return mark

    def _write(self):
        self._written = self.steps
        return True

    def _count_batches(self):
        if self._last_begun is None:
            return 0
        low, high = self._last_begun, self._last_begun + self._per_execution
        if self._batches is not None:
            high = min(high, self._batches)
        ended = min(self._ended, high)
        # Keras does not say how many steps an execution had when the data ended within it.
        is_unsure = self._per_execution > 1 and self._batches is None
        if ended > low and not is_unsure:
            return ended
        # The data has ended, or Keras reports the end of the batch in another thread, which is late.
        executed = self._executed()
        if executed is not None and low <= executed <= high:
            return executed
        return high if self._batches is not None else max(ended, low)

    def _executed(self):
        """The optimizer's count of this epoch's batches, or None where it skips some."""
        now, before = self._optimizer_count(), self._count_before_epoch
        skips = hasattr(getattr(self._model(), "optimizer", None), "inner_optimizer")
        return None if skips or now is None or before is None else now - before

    def _optimizer_count(self):
        model = self._model()
        with training_state(model):
            count = batches_seen(self._optimizer)
            return None if count is None else int(to_numpy(count) if hasattr(count, "value") else count)


def in_order(marks: Iterable[Mark]) -> list[Mark]:
    """The marks of a log without those that a resumed training has written again."""
    kept: list[Mark] = []
    for mark in marks:
        while kept and (kept[-1].step > mark.step or mark.epoch is not None and kept[-1].step == mark.step):
            kept.pop()
        kept.append(mark)
    return kept


def _skipped(mark):
    return mark.step - mark.iterations
