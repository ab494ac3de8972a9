"""Log-probabilities, and a student trained by a teacher: `python -m tests.scaling.beyond_training ENGINE` prints them.

In a process of its own, as `tests/scaling/training.py`, which has the engines and the data.
"""

import json
import sys

import keras
import numpy as np

import keras_xent as kx
from tests.internals import set_sizes
from tests.scaling import training

TOKENS_OF_BATCH = training.BATCH * training.TOKENS


class Policy(keras.Model):
    """A model whose loss is the log-likelihood of the tokens less an entropy bonus, both from its head."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def call(self, x):
        """The model's logits."""
        return self.model(x)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        """A sum over the tokens: that of a batch is the sum of those of its parts, on replicas too."""
        log_probs = kx.token_log_probs(self.model, x, y, temperature=2.0)
        head = self.model.get_layer("logits")
        hidden = keras.ops.cast(keras.ops.one_hot(y, head.kernel.shape[0]), "float32")
        found = kx.kernels.linear_token_statistics(hidden, head.kernel, y, head.bias)
        return keras.ops.sum(0.01 * found.logsumexp - log_probs - 0.1 * found.entropy) / TOKENS_OF_BATCH


def results():
    """Losses, weights, and log-probabilities."""
    tokens, labels, _ = training.data()
    policy = Policy(training.model_of(training.Case()))
    policy.compile(keras.optimizers.SGD(5.0))
    losses = policy.fit(tokens, labels, training.BATCH, epochs=2, shuffle=False, verbose=0).history["loss"]
    teacher, student = training.model_of(training.Case()), training.model_of(training.Case("TiedLogits"))
    # A teacher that is sure of what it says.
    teacher.set_weights([20.0 * w for w in teacher.get_weights()])
    distiller = keras.distillation.Distiller(
        teacher, student, kx.distillation.LogitsDistillation(2.0), student_loss_weight=0.3
    )
    distiller.compile(keras.optimizers.SGD(1.0), kx.losses.MaskedSequenceCrossentropy(ignore_class=0))
    history = distiller.fit(tokens, labels, training.BATCH, epochs=2, shuffle=False, verbose=0).history
    weights = [*policy.model.get_weights(), *student.get_weights()]
    return {
        "policy": losses,
        "distillation": history["distillation_loss"],
        "weights": [w.astype("float64").tolist() for w in weights],
        "log_probs": np.asarray(kx.token_log_probs(policy.model, tokens[:4], labels[:4])).tolist(),
    }


if __name__ == "__main__":
    # Several chunks on each device.
    set_sizes(setattr, fewest_rows=5, chunk_bytes=1)
    with training.ENGINES[sys.argv[1]]():
        print(json.dumps(results()))
