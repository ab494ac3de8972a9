"""How much memory does a first step take beyond what is there when it starts?

In a fresh process for each peer, compilation included: `python -m tools.bench.memory ROW PEER`.
"""

import json
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tools.bench import losses
from tools.bench.shapes import LANGUAGE_MODEL

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def measure(rounds: int) -> Iterator[dict]:
    """One record for each loss: the peak in MB, by peer, the same in every round and so taken once."""
    for row in losses.CLASSES:
        megabytes = {}
        for peer in losses.peers(row):
            command = [sys.executable, "-m", __name__, row, peer]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            megabytes[peer] = [json.loads(output)]
        about = {"shape": LANGUAGE_MODEL._asdict(), "dtype": "float32"}
        yield {"row": row, **about, "megabytes": megabytes}


def _peak(row, peer):
    labels, logits = losses.inputs(row, LANGUAGE_MODEL, "float32")
    step = losses.peers(row)[peer]
    if RESET.exists():
        RESET.write_text("5")  # sets the mark back to what is resident now
    start = _highest()
    step(labels, logits)[1][-1, -1].numpy()
    return round((_highest() - start) / 1e6)


def _highest():
    """The peak of the resident memory. Off Linux it includes the making of the data, which can hide a small step."""
    if not STATUS.exists():
        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Not ru_maxrss, which begins with the peak of the process that started this one.
    return 1024 * int(re.search(r"VmHWM:\s*(\d+)", STATUS.read_text())[1])


if __name__ == "__main__":
    print(_peak(*sys.argv[1:]))
