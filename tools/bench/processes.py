"""Measurements that start processes: the time of an import, and the number of compilations of XLA."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tools.bench.rows import Work
from tools.bench.workers import ROOT, Library, Missing, Worker


def imports(work: Work, rounds: int) -> dict:
    """Milliseconds of fresh processes, in turn. The first turn fills the caches of the disk."""
    times: dict[str, list[float]] = {name: [] for name in work.peers}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path}
    for turn in range(-1, rounds):
        for name, program in work.peers.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, env=environment)
            if turn >= 0:
                times[name].append(round(1e3 * (time.perf_counter() - start)))
    return {"rounds": rounds, "values": times, "missing": {}}


_FIRST_CALL = """
import time
import numpy as np
import keras
import keras_xent
loss = keras_xent.losses.SparseCategoricalCrossentropy(from_logits=True, label_smoothing=0.1)
x, y = np.zeros((2048, 1000), "float32"), np.zeros(2048, "int32")
if keras.backend.backend() == "jax":
    import jax
    start = time.perf_counter()
    jax.block_until_ready(jax.jit(jax.value_and_grad(lambda x: loss(y, x)))(x))
else:
    import tensorflow as tf
    x, start = tf.constant(x), time.perf_counter()
    with tf.GradientTape() as tape:
        tape.watch(x)
        value = loss(y, x)
    tape.gradient(value, x).numpy()
print(1e3 * (time.perf_counter() - start))
"""


def second_process(work: Work, rounds: int) -> dict:
    """Milliseconds of the first value and gradient: of a process that finds no programs, and of the next one."""
    times: dict[str, list[float]] = {name: [] for name in work.peers}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            flags = f"--tf_xla_persistent_cache_directory={folder}"
            environment = {
                **os.environ,
                "PYTHONPATH": path,
                "KERAS_BACKEND": work.case["backend"],
                "TF_XLA_FLAGS": flags,
                "JAX_COMPILATION_CACHE_DIR": folder,
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            }
            for name in reversed(work.peers):
                command = [sys.executable, "-c", _FIRST_CALL]
                found = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
                times[name].append(round(float(found.stdout.split()[-1]), 3))
    return {"rounds": rounds, "values": times, "missing": {}}


def compilations(work: Work, libraries: dict[str, Library]) -> dict:
    """Programs that XLA has been given, each peer in a fresh process; XLA leaves a file for each of them."""
    values: dict[str, list[float]] = {}
    missing = {}
    for name, library in work.peers.items():
        with tempfile.TemporaryDirectory() as folder:
            flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={folder} --xla_dump_hlo_as_text"
            worker = Worker(libraries[library], XLA_FLAGS=flags)
            try:
                worker.make(name, work.case, folder)
                for _ in range(work.case["steps"]):
                    worker.time(name)
                values[name] = [len(list(Path(folder).glob("*before_optimizations.txt")))]
            except Missing as reason:
                missing[name] = str(reason)
            finally:
                worker.end()
    return {"rounds": 1, "values": values, "missing": missing}
