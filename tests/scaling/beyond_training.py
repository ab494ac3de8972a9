"""Policies, preferences, distillation and calibration: `python -m tests.scaling.beyond_training ENGINE` prints numbers.

In a process of its own, as `tests/scaling/training.py`, which has the engines and the data.
"""

import json
import sys

import keras
import numpy as np

import keras_xent as kx
from tests.internals import set_sizes
from tests.scaling import training

ROWS, TOKENS_OF_BATCH = training.BATCH, training.BATCH * training.TOKENS


class OwnLoss(keras.Model):
    """A model whose subclass computes the loss."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def call(self, x):
        """The model's logits."""
        return self.model(x)


class Policy(OwnLoss):
    """Its loss is the log-likelihood of the tokens less an entropy bonus, both from its head."""

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        """A sum over the tokens: that of a batch is the sum of those of its parts, on replicas too."""
        log_probs = kx.token_log_probs(self.model, x, y, temperature=2.0)
        head = self.model.get_layer("logits")
        hidden = keras.ops.cast(keras.ops.one_hot(y, head.kernel.shape[0]), "float32")
        found = kx.kernels.linear_token_statistics(hidden, head.kernel, y, head.bias)
        return keras.ops.sum(0.01 * found.logsumexp - log_probs - 0.1 * found.entropy) / TOKENS_OF_BATCH


class Preference(OwnLoss):
    """It learns to prefer the labels to themselves read backwards, and the tokens of some rows to those of others."""

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        """A sum over pairs, and a mean over the valid tokens of all devices."""
        x, labels = keras.ops.cast(x, "int32"), keras.ops.cast(y, "int32")
        both = keras.ops.stack([labels, keras.ops.flip(labels, axis=1)], axis=1)
        twice = keras.ops.stack([x, x], axis=1)
        pairs = kx.sequence_loss(self.model, twice, both, loss=kx.preference.simpo, mask=both > 0, reduction="none")
        log_probs, advantages = kx.token_log_probs(self.model, x, labels), keras.ops.cos(labels[:, 0])
        tokens = kx.preference.grpo(log_probs, log_probs - 0.1, advantages, mask=labels > 0, reduction="token_mean")
        return keras.ops.sum(pairs) / ROWS + tokens


def results():
    """Losses, metrics, weights, log-probabilities, and a temperature."""
    tokens, labels, _ = training.data()
    policy, preference = (kind(training.model_of(training.Case())) for kind in (Policy, Preference))
    losses = {}
    for model, rate in ((policy, 5.0), (preference, 0.1)):
        model.compile(keras.optimizers.SGD(rate))
        history = model.fit(tokens, labels, training.BATCH, epochs=2, shuffle=False, verbose=0).history
        losses[type(model).__name__] = history["loss"]
    teacher, student = training.model_of(training.Case()), training.model_of(training.Case("TiedLogits"))
    # A teacher that is sure of what it says.
    teacher.set_weights([20.0 * w for w in teacher.get_weights()])
    distiller = keras.distillation.Distiller(
        teacher, student, kx.distillation.LogitsDistillation(2.0), student_loss_weight=0.3
    )
    metrics = [kx.metrics.Entropy(ignore_class=0), kx.metrics.CalibrationError(ignore_class=0)]
    distiller.compile(keras.optimizers.SGD(1.0), kx.losses.MaskedSequenceCrossentropy(ignore_class=0), metrics=metrics)
    history = distiller.fit(tokens, labels, training.BATCH, epochs=2, shuffle=False, verbose=0).history
    weights = [w for model in (policy.model, preference.model, student) for w in model.get_weights()]
    # The teacher is right of half of the tokens, so that there is a best temperature.
    likeliest = np.asarray(kx.top_k_log_probs(teacher, tokens, k=1).ids)[..., 0]
    half_right = np.where(np.arange(training.TOKENS) % 2, likeliest, labels)
    return {
        **losses,
        "distillation": history["distillation_loss"],
        "metrics": [history[metric.name] for metric in metrics],
        "temperature": kx.calibrate(teacher, (tokens, half_right), batch_size=training.BATCH),
        "weights": [w.astype("float64").tolist() for w in weights],
        "log_probs": np.asarray(kx.token_log_probs(policy.model, tokens[:4], labels[:4])).tolist(),
    }


if __name__ == "__main__":
    # Several chunks on each device.
    set_sizes(setattr, fewest_rows=5, chunk_bytes=1)
    with training.ENGINES[sys.argv[1]]():
        print(json.dumps(results()))
