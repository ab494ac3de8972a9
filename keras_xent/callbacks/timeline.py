"""Numbers of epochs and steps that go on over several calls of `fit`, and in a new process."""

import glob
import os
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from keras import ops


class Epoch(NamedTuple):
    """An epoch that has ended: its number, and the steps until its end."""

    number: int
    steps: int


class Timeline:
    """Counts on where the training of a model has stopped: in this process, or as its optimizer and a log remember.

    Keras begins each call of `fit` with epoch 0 unless it is given `initial_epoch`. A step is a batch, of which the
    optimizer keeps the number.
    """

    def __init__(self) -> None:
        self._model: Callable[[], Any] = lambda: None
        self._optimizer: Any = None
        # Steps of the model before its optimizer began to count.
        self._steps_of_others = 0
        self._ended: list[Epoch] = []
        self._begins = True
        self._shift = 0
        self._steps_before_epoch = 0
        # Steps that have begun, and after `end_batches` all of them; and those of which something was written.
        self.steps = self._written = 0
        # Whether the batches of the epoch have ended, and how many have at least.
        self.batches_ended, self._last_batches = False, 0

    def begin_fit(self, model: Any) -> None:
        """`fit` begins, with a model that may have been trained before."""
        optimizer = getattr(model, "optimizer", None)
        # The one inside counts where the outer one scales the loss.
        optimizer = getattr(optimizer, "inner_optimizer", optimizer)
        if self._model() is not model:
            self._ended, self.steps, self._steps_of_others = [], 0, 0
        elif optimizer is not self._optimizer:
            self._steps_of_others = self.steps
        self._model, self._optimizer = weakref.ref(model), optimizer
        self._begins = True

    def begin_epoch(self, epoch: int, log: Callable[[], Iterable[Epoch]]) -> None:
        """An epoch begins. `log` gives what an earlier process has written of the training that goes on."""
        self.batches_ended, self._last_batches = False, 0
        # Not when `fit` begins: another callback may read a backup there.
        self.steps = self._written = self._steps_before_epoch = self._counted(otherwise=self.steps)
        if self._begins:
            known = self._ended or (list(log()) if self.steps else [])
            # What came after the checkpoint that is trained on will come again.
            self._ended = [one for one in known if one.steps <= self.steps]
            following = self._ended[-1].number + 1 if self._ended else 0
            self._shift = max(0, following - epoch)
            self._begins = False

    def number(self, epoch: int) -> int:
        """The number of Keras' epoch on this timeline."""
        return epoch + self._shift

    def begin_batch(self, batch: int, every: Any) -> bool:
        """A batch begins, `batch` batches after the beginning of the epoch. Whether those before are to be written.

        `every` is after how many steps something is to be written, or "epoch".
        """
        self.steps = self._steps_before_epoch + batch
        return every != "epoch" and self._written // every != self.steps // every and self._write()

    def end_batch(self, batch: int) -> None:
        """A batch has ended; where several steps are executed at once, the last of those."""
        self._last_batches = batch + 1

    def end_batches(self, every: Any) -> bool:
        """The batches of the epoch have ended. Whether some are still to be written. Waits for the device.

        The optimizer knows best how many they were: where several steps are executed at once, Keras reports as many of
        them at the end of an epoch as ever.
        """
        self.batches_ended = True
        self.steps = max(self.steps, self._counted(otherwise=self._steps_before_epoch + self._last_batches))
        return every != "epoch" and self.steps > self._written and self._write()

    def end_epoch(self, epoch: int) -> Epoch:
        """An epoch has ended."""
        self._ended.append(Epoch(self.number(epoch), self.steps))
        return self._ended[-1]

    def _write(self):
        self._written = self.steps
        return True

    def _counted(self, otherwise):
        # Where gradients are accumulated, `iterations` counts updates. What it is made from counts batches.
        batches = getattr(self._optimizer, "_iterations", getattr(self._optimizer, "iterations", None))
        return otherwise if batches is None else self._steps_of_others + int(ops.convert_to_numpy(batches))


def epochs_in_events(folder: str) -> Iterator[Epoch]:
    """The epochs that TensorBoard's files in a folder tell of."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.util import tensor_util

    for path in sorted(glob.glob(os.path.join(glob.escape(folder), "events.out.tfevents.*"))):
        for event in EventFileLoader(path).Load():
            for value in event.summary.value:
                if value.tag == "epoch_iterations":
                    yield Epoch(event.step, int(tensor_util.make_ndarray(value.tensor)))
