"""On what was measured? Nothing that names the machine or its owner."""

import importlib.metadata
import platform
import shutil
import subprocess
from pathlib import Path

from tools.bench.workers import cores


def facts() -> dict:
    """The processor and the versions."""
    packages = [name for name in ("tensorflow", "keras", "numpy") if _is_installed(name)]
    gpu = _gpu()
    return {
        **({"GPU": gpu} if gpu else {}),
        "processor": _processor(),
        "cores": cores(),
        "system": platform.system(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
    }


def _is_installed(name):
    return any(importlib.metadata.distributions(name=name))


def _gpu():
    """The name of an NVIDIA GPU and its driver's version."""
    if not shutil.which("nvidia-smi"):
        return None
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    lines = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    return lines[0].replace(",", ", driver") if lines else None


def _processor():
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
