"""Runs the signatures of SavedModels in a process that has neither Keras nor this package, only TensorFlow.

    python plain.py CALLS.npz RESULTS.npz

Each array of the one file is named `folder|signature|call|input`, each of the other `folder|signature|call|output`.
"""

import sys

# TensorFlow imports Keras if it can.
sys.modules["keras"] = sys.modules["keras_xent"] = None

import numpy as np
import tensorflow as tf

calls = {}
with np.load(sys.argv[1]) as arrays:
    for key, array in arrays.items():
        folder, signature, call, name = key.split("|")
        calls.setdefault((folder, signature, call), {})[name] = tf.constant(array)

results, loaded = {}, {}
for (folder, signature, call), inputs in calls.items():
    if folder not in loaded:
        loaded[folder] = tf.saved_model.load(folder)
    for name, value in loaded[folder].signatures[signature](**inputs).items():
        results[f"{folder}|{signature}|{call}|{name}"] = value.numpy()
assert sys.modules["keras"] is None and not any(name.startswith("keras_xent.") for name in sys.modules)
np.savez(sys.argv[2], **results)
