"""How much longer does a program take to start?"""

import subprocess
import sys
import time
from collections.abc import Iterator

PROGRAMS = {"Keras": "import keras", "Keras and ours": "import keras, keras_xent"}


def measure(rounds: int) -> Iterator[dict]:
    """The milliseconds of fresh processes, in turn."""
    times: dict[str, list[float]] = {name: [] for name in PROGRAMS}
    for turn in range(-1, rounds):  # the first one fills the caches of the disk
        for name, program in PROGRAMS.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
            if turn >= 0:
                times[name].append(round(1e3 * (time.perf_counter() - start)))
    yield {"row": "import", "milliseconds": times}
