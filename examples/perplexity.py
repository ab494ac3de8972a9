"""Perplexity from the formula to the progress bar, and why the mean of batch losses is not the perplexity.

    python examples/perplexity.py    # seconds; `--smoke` is the same

Three batches of a sequence model's predictions, with 32, 4 and 8 valid tokens. Nothing is trained: the point is
what is reported of one and the same model. The figures in docs/perplexity.md are printed here.
"""

import argparse
import math

import keras
import numpy as np

import keras_xent as kx

CLASSES, PAD = 50, 0
VALID, LENGTH = (32, 4, 8), 16


def make_batches():
    """Logits `[2, 16, 50]` and labels `[2, 16]` of three batches; on the shorter ones the model is worse."""
    rng = np.random.default_rng(0)
    for valid, scale in zip(VALID, (3.0, 0.5, 1.5), strict=True):
        labels = rng.integers(1, CLASSES, (2, LENGTH))
        logits = rng.normal(size=(2, LENGTH, CLASSES)).astype("float32")
        logits[np.arange(2)[:, None], np.arange(LENGTH), labels] += scale
        labels.reshape(-1)[valid:] = PAD
        yield logits, labels


def losses_of_tokens(logits, labels):
    """The negative log-likelihood of each valid token, by NumPy in float64."""
    logits = logits.astype("float64")
    log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return -np.take_along_axis(log_p, labels[..., None], axis=-1)[..., 0][labels != PAD]


def reported(loss, metrics, batches, weights=lambda labels: ()):
    """Returns the results of `evaluate`, with the batches as they are."""
    inputs = keras.Input((None, CLASSES))
    model = keras.Model(inputs, keras.layers.Activation("linear")(inputs))
    model.compile(loss=loss, metrics=metrics)
    data = ((*batch, *weights(batch[1])) for batch in batches)
    return model.evaluate(data, steps=len(batches), verbose=0, return_dict=True)


def main():
    """Prints the ways to sum up three batches."""
    batches = list(make_batches())
    losses = [losses_of_tokens(*batch) for batch in batches]
    nll = np.concatenate(losses).mean()
    print("     valid tokens   nats per token   perplexity")
    for one in losses:
        print(f"{len(one):17} {one.mean():16.4f} {math.exp(one.mean()):12.4f}")

    ours = kx.losses.MaskedSequenceCrossentropy(ignore_class=PAD)
    with_metric = reported(ours, [kx.metrics.Perplexity(ignore_class=PAD)], batches)
    theirs = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    by_weights = reported(theirs, [], batches, weights=lambda labels: [(labels != PAD).astype("float32")])
    rows = {
        "exp(sum of nats / number of tokens)": math.exp(nll),
        "keras_xent.metrics.Perplexity": with_metric["perplexity"],
        "exp of the reported loss, a mean over batches": math.exp(with_metric["loss"]),
        "mean of the batches' perplexities": np.mean([math.exp(one.mean()) for one in losses]),
        "exp of Keras' loss, padding by sample weights": math.exp(by_weights["loss"]),
    }
    print("\nThe three batches together")
    for name, value in rows.items():
        print(f"  {name:48}{value:10.4f}")

    bits = nll / math.log(2)
    print("\nThe same in other units")
    print(f"  {'nats per token':48}{nll:10.4f}")
    print(f"  {'bits per token':48}{bits:10.4f}")
    print(f"  {'2 to the bits':48}{2**bits:10.4f}")
    # Let every token stand for as many bytes as its number has digits.
    digits = np.array([len(str(token)) for token in range(CLASSES)])
    number = sum(digits[labels[labels != PAD]].sum() for _, labels in batches)
    metric = kx.metrics.BitsPerByte(digits.tolist(), ignore_class=PAD)
    for logits, labels in batches:
        metric.update_state(labels, logits)
    print(f"  {f'bits per byte, {number} bytes':48}{sum(map(np.sum, losses)) / math.log(2) / number:10.4f}")
    print(f"  {'keras_xent.metrics.BitsPerByte':48}{float(metric.result()):10.4f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="changes nothing: it takes seconds")
    parser.parse_args()
    main()
