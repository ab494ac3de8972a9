"""Writers for TensorBoard: a folder for each run, and the parent folder for data of all runs."""

import contextlib
import os
import time
from collections.abc import Iterable
from typing import Any

# Seconds between two transfers to a place that is no local folder, where each writes the file anew.
_REMOTE_FLUSH = 30.0


class RunWriters:
    """Opens a file for every run that something is written into, and keeps it complete."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self._writers: dict[str, Any] = {}
        self._flushed: dict[str, float] = {}
        self._default: contextlib.ExitStack | None = None

    def writer(self, run: str) -> Any:
        """The writer of `tf.summary` for a run; of the folder above for `""`."""
        if run not in self._writers:
            import tensorflow as tf

            self._writers[run] = tf.summary.create_file_writer(os.path.join(self.folder, run) if run else self.folder)
        return self._writers[run]

    def make_default(self, run: str, step: int, is_recorded: bool) -> None:
        """Has summaries of the user's own layers go into a run, until the next call or `end_default`."""
        import tensorflow as tf

        self.end_default()
        self._default = contextlib.ExitStack()
        self._default.enter_context(self.writer(run).as_default(step))
        self._default.enter_context(tf.summary.record_if(is_recorded))

    def end_default(self) -> None:
        """Leaves what `make_default` has entered."""
        if self._default is not None:
            self._default.close()
            self._default = None

    def write(self, run: str, summaries: Iterable[Any], step: int = 0) -> None:
        """Writes summaries as one event, which takes a fraction of the time that one for each takes."""
        import tensorflow as tf

        # One message after the other is the message of both.
        event = b"".join(one.SerializeToString() for one in summaries)
        with self.writer(run).as_default(step), tf.summary.record_if(True):
            tf.summary.experimental.write_raw_pb(event, step)

    def flush(self) -> None:
        """Completes the files, since no callback is called where `fit` was interrupted."""
        now, remote = time.monotonic(), "://" in self.folder
        for run, writer in self._writers.items():
            if not remote or now - self._flushed.get(run, -_REMOTE_FLUSH) >= _REMOTE_FLUSH:
                writer.flush()
                self._flushed[run] = now

    def close(self) -> None:
        """Closes all files. The next to be written are others."""
        self.end_default()
        for writer in self._writers.values():
            writer.close()
        self._writers, self._flushed = {}, {}
