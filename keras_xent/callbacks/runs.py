"""Where a TensorBoard callback writes: each run is a folder, and the root has what is of all runs."""

import os
import time
from collections.abc import Iterable
from typing import Any

import keras

# Seconds between two transfers to a place that is no local folder, where each writes the file anew.
_REMOTE_FLUSH = 30.0


class Runs(keras.callbacks.TensorBoard):
    """Keras' callback, with a writer for every run."""

    def _writer(self, run: str) -> Any:
        if run not in self._writers:
            folder = os.path.join(self._log_write_dir, run) if run else self._log_write_dir
            self._writers[run] = self.summary.create_file_writer(folder)
        return self._writers[run]

    def _end_runs(self) -> None:
        """Closes all files, and leaves what a call that was interrupted has entered."""
        while self._prev_summary_state:
            self._pop_writer()
        self._close_writers()
        self._writers: dict[str, Any] = {}
        self._flushed: dict[str, float] = {}

    def _flush(self) -> None:
        """Completes the files, since nobody tells a callback that `fit` was interrupted."""
        now, remote = time.monotonic(), "://" in self.log_dir
        for run, writer in self._writers.items():
            if not remote or now - self._flushed.get(run, -_REMOTE_FLUSH) >= _REMOTE_FLUSH:
                writer.flush()
                self._flushed[run] = now

    def _write_raw(self, run: str, summaries: Iterable[Any], step: int = 0) -> None:
        """Writes summaries as one event, which takes a fraction of the time that one for each takes."""
        # One message after the other is the message of both.
        event = b"".join(one.SerializeToString() for one in summaries)
        with self._writer(run).as_default(step), self.summary.record_if(True):
            self.summary.experimental.write_raw_pb(event, step)

    def _write_scalars(self, run: str, values: dict[str, float], step: int) -> None:
        from tensorboard.plugins.scalar.summary_v2 import scalar_pb

        self._write_raw(run, [scalar_pb(tag, value) for tag, value in values.items()], step)
