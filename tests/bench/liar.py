"""A library for tools/bench that is NumPy: some of its peers tell the truth."""

import os
import time

import numpy as np

from tools.bench import agreement, data


def peer(name, case, folder):
    right = agreement.reference(case, folder) or {"loss": np.float32(1.5)}

    calls = []

    def call():
        if name.endswith("dies"):
            os._exit(3)
        if name.endswith("dies later"):
            calls.append(name)
            if len(calls) > 2:
                os._exit(4)
        if name.endswith("sleeps"):
            time.sleep(0.05)
        found = dict(right)
        if name.endswith("NaN"):
            found["loss"] = np.float64("nan")
        if name.endswith("lies a little"):
            found["gradient"] = right["gradient"].copy()
            found["gradient"][-1, -1] += 0.001 * np.abs(right["gradient"]).max()
        if name.endswith("leaves out the gradient"):
            del found["gradient"]
        if name.endswith("cannot"):
            raise NotImplementedError("it cannot")
        return found

    print("what a library prints is no answer")
    assert data.read(folder, "logits").shape == (case["rows"], case["classes"])
    return call


def arrays(results):
    return {name: np.asarray(value, "float32") for name, value in results.items()}


def versions():
    return {"numpy": np.__version__}


def forget():
    pass
