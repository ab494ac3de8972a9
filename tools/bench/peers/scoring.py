"""The log-probabilities of tokens under a model of KerasHub: by its `score`, or by `kx.token_log_probs`."""

from collections.abc import Callable

import keras
import numpy as np
from keras import ops

import keras_xent as kx


def peer(name: str, case: dict, folder: str) -> Callable:
    """One of the two, with a model of its own that has the same weights."""
    import keras_hub

    keras.utils.set_random_seed(0)
    size = {"vocabulary_size": case["classes"], "num_layers": 1, "num_heads": 2, "hidden_dim": case["features"]}
    length = {"intermediate_dim": 2 * case["features"], "max_sequence_length": case["length"]}
    model = keras_hub.models.GPT2CausalLM(keras_hub.models.GPT2Backbone(**size, **length))
    tokens = np.random.default_rng(0).integers(1, case["classes"], (case["batch"], case["length"] + 1), "int32")
    x, labels, mask = tokens[:, :-1], tokens[:, 1:], np.ones((case["batch"], case["length"]), "int32")

    def call():
        if name == "ours":
            found = kx.token_log_probs(model, {"token_ids": x, "padding_mask": mask}, labels)
        else:
            found = -model.score(x, mask, scoring_mode="loss", target_ids=labels)
        found = ops.convert_to_numpy(found)
        return {"loss": found.mean(), "log_probs": found}

    return call
