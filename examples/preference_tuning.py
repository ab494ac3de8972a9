"""Tune a small language model on preferences: true continuations of a text rather than its own (DPO).

    python examples/preference_tuning.py            # a few minutes on two cores
    python examples/preference_tuning.py --smoke    # the same steps at toy size

The model of language_model.py is trained on Python's language reference. Then it continues pieces of that text itself;
in each pair the true continuation is preferred to its own. What is measured is the share of pairs of other documents in
which the model finds the true continuation more likely. Before the tuning that is low: it samples what it finds likely.

No logits are materialized: `keras_xent.sequence_loss` computes loss and gradient from the output layer's inputs.
"""

import argparse
import functools
from pathlib import Path

import keras
import matplotlib
import numpy as np
from language_model import PAD, START, build_model, read_documents, shuffled_batches
from tokenizers import ByteLevelBPETokenizer

import keras_xent as kx

matplotlib.use("Agg")  # draws into a file, on machines without a screen too
from matplotlib import pyplot


def windows(documents, tokenizer, length):
    """Pieces of `length` tokens, `[B, length]`, from documents given as lists of paragraphs."""
    ids = [tokenizer.encode("".join(paragraphs)).ids for paragraphs in documents]
    pieces = [one[i : i + length] for one in ids for i in range(0, len(one) - length + 1, length)]
    return np.array(pieces, "int32")


def inputs_of(targets):
    """Returns the inputs of the model: each token is the one before its target."""
    return np.insert(targets[..., :-1], 0, START, axis=-1)


def continued(model, targets, prompt, rng):
    """The first `prompt` tokens of each row, continued by the model's own samples."""
    targets = np.where(np.arange(targets.shape[1]) < prompt, targets, PAD + 2)
    for position in range(prompt, targets.shape[1]):
        logits = keras.ops.convert_to_numpy(model(inputs_of(targets)))[:, position]
        # The largest of logits and Gumbel noise is a sample of their softmax.
        targets[:, position] = np.argmax(logits + rng.gumbel(size=logits.shape), axis=1)
    return targets


def log_probs_of(model, targets, prompt):
    """The log-probability of what follows the prompt, `[B]`."""
    mask = np.broadcast_to(np.arange(targets.shape[1]) >= prompt, targets.shape)
    parts = [slice(i, i + 64) for i in range(0, len(targets), 64)]
    found = [kx.sequence_log_probs(model, inputs_of(targets[p]), targets[p], mask=mask[p]) for p in parts]
    return np.concatenate([keras.ops.convert_to_numpy(one) for one in found])


class PreferenceModel(keras.Model):
    """A policy whose loss is that of direct preference optimization."""

    def __init__(self, policy, beta):
        super().__init__()
        self.policy, self.dpo = policy, functools.partial(kx.preference.dpo, beta=beta)

    def call(self, x):
        """The policy's logits, which nothing reads while it is tuned."""
        return self.policy(x)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        """`y` holds pairs of texts `[B, 2, T]`, the mask of what follows the prompt, and reference numbers."""
        logps = y["chosen_logps"], y["rejected_logps"]
        return kx.sequence_loss(self.policy, y["inputs"], y["targets"], loss=self.dpo, arrays=logps, mask=y["mask"])


def accuracy(model, chosen, rejected, prompt):
    """The share of pairs in which the preferred continuation is the more likely one."""
    return float(np.mean(log_probs_of(model, chosen, prompt) > log_probs_of(model, rejected, prompt)))


def main(output, smoke, seed=0):
    """Train, sample, tune, and compare; the accuracies on held-out pairs before the tuning and after each epoch."""
    output.mkdir(parents=True, exist_ok=True)
    keras.utils.set_random_seed(seed)
    rng = np.random.default_rng(seed)
    limit, vocabulary, length, prompt = (24, 400, 24, 8) if smoke else (None, 1000, 48, 16)
    size, epochs, pairs = ((1, 32, 2), 3, 128) if smoke else ((2, 96, 4), 5, 1024)
    training, validation = read_documents(limit)
    tokenizer = ByteLevelBPETokenizer()
    texts = (text for paragraphs in training for text in paragraphs)
    tokenizer.train_from_iterator(texts, vocabulary, special_tokens=["[PAD]", "[START]"], show_progress=False)
    targets, held_out = (windows(documents, tokenizer, length) for documents in (training, validation))
    held_out = held_out[:256]

    policy = kx.fuse_head(build_model(vocabulary, length, *size))
    loss = kx.losses.MaskedSequenceCrossentropy(ignore_class=PAD)
    policy.compile(keras.optimizers.Adam(3e-3), loss, metrics=[kx.metrics.Perplexity(ignore_class=PAD)])
    print("Training the language model ...", flush=True)
    policy.fit(**shuffled_batches(inputs_of(targets), targets, 16), epochs=epochs, verbose=2)

    chosen = targets[rng.permutation(len(targets))[:pairs]]
    print(f"It continues {len(chosen)} texts to be tuned on, and {len(held_out)} of other documents ...", flush=True)
    rejected, held_out_rejected = (continued(policy, rows, prompt, rng) for rows in (chosen, held_out))
    both = np.stack([chosen, rejected], axis=1)
    y = {"inputs": inputs_of(both), "targets": both, "mask": np.broadcast_to(np.arange(length) >= prompt, both.shape)}
    y["chosen_logps"], y["rejected_logps"] = (log_probs_of(policy, rows, prompt) for rows in (chosen, rejected))

    tuned = PreferenceModel(policy, beta=0.1)
    tuned.compile(keras.optimizers.Adam(2e-3 if smoke else 3e-4))
    print("Preference tuning; in which share of the held-out pairs the true continuation is the more likely one:")
    accuracies = [accuracy(policy, held_out, held_out_rejected, prompt)]
    print(f"  before   {accuracies[0]:.3f}   loss {np.log(2):.3f}", flush=True)
    for epoch in range(1, 5):
        loss = tuned.fit(inputs_of(chosen), y, batch_size=16, verbose=0).history["loss"][0]
        accuracies.append(accuracy(policy, held_out, held_out_rejected, prompt))
        print(f"  epoch {epoch}  {accuracies[-1]:.3f}   loss {loss:.3f}", flush=True)

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    axes.plot(range(len(accuracies)), accuracies, marker="o", label="after preference tuning")
    axes.axhline(accuracies[0], color="gray", linestyle="--", label="before it")
    axes.set(xlabel="epoch of preference tuning", ylabel="accuracy on held-out pairs", ylim=(0, 1))
    axes.legend()
    figure.savefig(output / "preference.png", dpi=100)
    print(f"Curve: {output / 'preference.png'}")
    return accuracies


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="every step at toy size")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument(
        "--output", type=Path, default=Path("demo-output/preference_tuning"), metavar="DIR", help="default: %(default)s"
    )
    arguments = parser.parse_args()
    main(arguments.output, arguments.smoke, arguments.seed)
