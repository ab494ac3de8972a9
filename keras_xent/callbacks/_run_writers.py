"""Writers for TensorBoard: a folder for each run, and the parent folder for data of all runs."""

import contextlib
import contextvars
import os
import time
from collections.abc import Iterable, Iterator
from typing import Any

import keras

from keras_xent._keras import callbacks_of_loop
from keras_xent.callbacks._training_log import TrainingLog


class _WithoutFlush(Exception):
    """Leaves a default writer, which flushes its file only where nothing was raised."""


# The writers that are the default one now. Each is left before another is entered, or it would be the default again
# when the other is left.
_default_of: contextvars.ContextVar["RunWriters | None"] = contextvars.ContextVar("_default_of", default=None)
# Seconds between two transfers to a place that is no local folder, where each writes the file anew.
_REMOTE_FLUSH = 30.0


class RunWriters:
    """Opens a file for every run that something is written into, and keeps it complete."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self._writers: dict[str, Any] = {}
        # Runs that have something written which may not be in the file yet, and when each was flushed.
        self._unflushed: set[str] = set()
        self._flushed: dict[str, float] = {}
        # What the default writer was entered with, the run that it is of, and whether summaries are recorded.
        self._default: contextlib.ExitStack | None = None
        self._default_run: str | None = None
        self._is_recorded = False

    def writer(self, run: str) -> Any:
        """The writer of `tf.summary` for a run; of the folder above for `""`."""
        if run not in self._writers:
            import tensorflow as tf

            self._writers[run] = tf.summary.create_file_writer(os.path.join(self.folder, run) if run else self.folder)
        return self._writers[run]

    def make_default(self, run: str, step: int, is_recorded: bool) -> None:
        """Has summaries of the user's own layers go into a run, until the next call or `end_default`."""
        import tensorflow as tf

        self._is_recorded = is_recorded
        others = _default_of.get()
        if others is not self or self._default_run != run:
            if others is not None:
                others.end_default()
            self._default, self._default_run = contextlib.ExitStack(), run
            self._default.enter_context(self.writer(run).as_default(step))
            self._default.enter_context(tf.summary.record_if(lambda: self._is_recorded))
            _default_of.set(self)
        # Leaving and entering the writer for every step would flush its file each time.
        tf.summary.experimental.set_step(step)

    def end_default(self) -> None:
        """Leaves what `make_default` has entered."""
        if self._default is not None:
            self._default.close()
            self._default = self._default_run = None
            _default_of.set(None)

    def write(self, run: str, summaries: Iterable[Any], step: int = 0) -> None:
        """Writes summaries as one event, which takes a fraction of the time that one for each takes."""
        import tensorflow as tf

        # One message after the other is the message of both.
        event = b"".join(one.SerializeToString() for one in summaries)
        # Whatever writer is the default: another callback may have entered one.
        with contextlib.suppress(_WithoutFlush), self.writer(run).as_default(step), tf.summary.record_if(True):
            tf.summary.experimental.write_raw_pb(event, step)
            raise _WithoutFlush
        self._unflushed.add(run)

    def flush(self) -> None:
        """Completes the files, since no callback is called where `fit` was interrupted."""
        now, remote = time.monotonic(), "://" in self.folder
        for run in list(self._unflushed):
            if not remote or now - self._flushed.get(run, -_REMOTE_FLUSH) >= _REMOTE_FLUSH:
                self._writers[run].flush()
                self._unflushed.discard(run)
                self._flushed[run] = now

    def close(self) -> None:
        """Closes all files. The next to be written are others."""
        self.end_default()
        for writer in self._writers.values():
            writer.close()
        self._writers, self._flushed, self._unflushed = {}, {}, set()


def keras_sets_default() -> bool:
    """Returns whether Keras' own callback is one of this `fit` or `evaluate`.

    It writes the loss of batches into whatever writer is the default, and leaves its own as the default for the next.
    """
    return any(
        isinstance(one, keras.callbacks.TensorBoard) and not isinstance(one, TrainingLog) for one in callbacks_of_loop()
    )


@contextlib.contextmanager
def writing_epochs_only(callback: Any) -> Iterator[None]:
    """Inside, Keras' part of a callback sets no default writer."""
    update_freq, callback.update_freq = callback.update_freq, "epoch"
    try:
        yield
    finally:
        callback.update_freq = update_freq
