"""The highest that the memory of this process has been."""

import re
import resource
import sys
from pathlib import Path

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def reset() -> None:
    """Sets the mark of the highest memory back to what is resident now, on Linux."""
    if RESET.exists():
        RESET.write_text("5")


def highest() -> int:
    """The peak of the resident memory. Off Linux it includes the making of the data, which can hide a small step."""
    if not STATUS.exists():
        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Not ru_maxrss, which begins with the peak of the process that started this one.
    return 1024 * int(re.search(r"VmHWM:\s*(\d+)", STATUS.read_text())[1])
