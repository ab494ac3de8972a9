"""Train a small causal language model through `compile` and `fit`, and know its perplexity.

    python examples/language_model.py            # about three minutes on two cores
    python examples/language_model.py --smoke    # the same steps at toy size, in seconds

The text is the language reference that Python carries in `pydoc_data.topics`: nothing is downloaded. Three lines belong
to `keras_xent`: the loss, the metric and the TensorBoard callback. All the others are ordinary Keras.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics

import keras
import matplotlib
import numpy as np
from tokenizers import ByteLevelBPETokenizer

import keras_xent

matplotlib.use("Agg")  # draws into a file, on machines without a screen too
from matplotlib import pyplot

PAD, START = 0, 1


def read_documents(limit):
    """Training and validation documents, each a list of paragraphs; no paragraph comes twice."""
    names = sorted(topics)[:limit]
    held_out = names[::8]
    # Topics quote each other at length. The held-out documents go first, so that a paragraph of theirs is dropped from
    # every training document: the model cannot know it by heart.
    seen, training, validation = set(), [], []
    for name in sorted(names, key=lambda name: name not in held_out):
        paragraphs = dict.fromkeys(re.split(r"\n{2,}", topics[name].strip("\n")))
        fresh = [text + "\n\n" for text in paragraphs if text not in seen]
        seen.update(paragraphs)
        (validation if name in held_out else training).append(fresh)
    return training, validation


def encode(documents, tokenizer, max_length):
    """Token sequences of uneven length: as many neighboring paragraphs as fit `max_length`."""
    sequences = []
    for paragraphs in documents:
        sequences.append([])
        for encoding in tokenizer.encode_batch(paragraphs):
            for start in range(0, len(encoding.ids), max_length):
                piece = encoding.ids[start : start + max_length]
                if len(sequences[-1]) + len(piece) > max_length:
                    sequences.append([])
                sequences[-1].extend(piece)
    return [sequence for sequence in sequences if sequence]


def pad(sequences, max_length):
    """Inputs and targets `[B, T]`, padded with 0 at the end: each input is the token before its target."""
    targets = keras.utils.pad_sequences(sequences, max_length, padding="post", value=PAD)
    return np.insert(targets[:, :-1], 0, START, axis=1), targets


def shuffled_batches(inputs, targets, size):
    """The arguments of `fit` for the rows of both arrays, in another order in each epoch."""
    if keras.backend.backend() != "tensorflow":
        return {"x": inputs, "y": targets, "batch_size": size}
    # What `fit` makes of arrays has autotuning on, with which one epoch in five starts four seconds late (TensorFlow
    # 2.21: the iterator of the epoch before waits for the autotuning thread; see docs/troubleshooting.md).
    import tensorflow as tf

    options = tf.data.Options()
    options.autotune.enabled = False
    rows = tf.data.Dataset.from_tensor_slices((inputs, targets)).shuffle(len(inputs))
    return {"x": rows.batch(size).with_options(options), "shuffle": False}  # the rows are shuffled above


def build_model(vocabulary, max_length, layers, width, heads, dropout=0.1):
    """A decoder-only transformer of standard Keras layers."""
    tokens = keras.Input([None], dtype="int32", name="tokens")
    # `mask_zero` keeps attention off the padding; Keras hands the mask on, layer by layer, up to loss and metric.
    x = keras.layers.Embedding(vocabulary, width, mask_zero=True)(tokens)
    positions = keras.ops.cumsum(keras.ops.ones_like(tokens), axis=1) - 1
    x = keras.layers.Add()([x, keras.layers.Embedding(max_length, width)(positions)])
    x = keras.layers.Dropout(dropout)(x)
    for _ in range(layers):
        h = keras.layers.LayerNormalization()(x)
        h = keras.layers.MultiHeadAttention(heads, width // heads)(h, h, use_causal_mask=True)
        x = keras.layers.Add()([x, keras.layers.Dropout(dropout)(h)])
        h = keras.layers.LayerNormalization()(x)
        h = keras.layers.Dense(4 * width, activation="gelu")(h)
        h = keras.layers.Dense(width)(h)
        x = keras.layers.Add()([x, keras.layers.Dropout(dropout)(h)])
    x = keras.layers.LayerNormalization()(x)
    return keras.Model(tokens, keras.layers.Dense(vocabulary, name="logits")(x))


def unigram_perplexity(training, validation, vocabulary):
    """Perplexity of a model that knows how often each token occurs, and nothing else."""
    counts = 1 + np.bincount(np.concatenate(training), minlength=vocabulary)  # add-one smoothing
    log_p = np.log(counts / counts.sum())
    return float(np.exp(-log_p[np.concatenate(validation)].mean()))


def generate(model, ids, length, top=5):
    """The tokens `ids` continued up to `length`, each new one drawn from the `top` likeliest."""
    rng = np.random.default_rng(0)
    while len(ids) < length:
        logits = keras.ops.convert_to_numpy(model(np.array([ids], "int32")))[0, -1]
        likeliest = np.argsort(logits)[-top:]
        p = np.exp(logits[likeliest] - logits.max())
        ids = [*ids, int(rng.choice(likeliest, p=p / p.sum()))]
    return ids


def draw_curves(history, unigram, path):
    """Perplexity by epoch, training and validation, with the unigram model as a line."""
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    epochs = range(1, len(history["perplexity"]) + 1)
    axes.plot(epochs, history["perplexity"], marker="o", label="training (with dropout)")
    axes.plot(epochs, history["val_perplexity"], marker="o", label="validation")
    axes.axhline(unigram, color="gray", linestyle="--", label="unigram model, validation")
    axes.set(xlabel="epoch", ylabel="perplexity per token", yscale="log")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.yaxis.set_major_formatter("{x:.0f}")
    axes.yaxis.set_minor_formatter("{x:.0f}")
    axes.legend()
    figure.savefig(path, dpi=150)


def evaluate_saved(output):
    """Perplexity of the saved model, for a process that knows the files and has imported `keras_xent`."""
    model = keras.models.load_model(output / "model.keras")
    inputs, targets = np.load(output / "validation.npy")
    return model.evaluate(inputs, targets, verbose=0, return_dict=True)["perplexity"]


def main(output, smoke, epochs, seed):
    """Train, save, reload in a fresh process, and compare."""
    begin = time.perf_counter()
    output.mkdir(parents=True, exist_ok=True)
    documents, vocabulary, max_length = (16, 400, 64) if smoke else (None, 1000, 128)
    size = (1, 32, 2) if smoke else (2, 96, 4)
    keras.utils.set_random_seed(seed)

    training, validation = read_documents(documents)
    tokenizer = ByteLevelBPETokenizer()
    texts = (text for paragraphs in training for text in paragraphs)
    special_tokens = ["[PAD]", "[START]"]  # numbers 0 and 1
    tokenizer.train_from_iterator(texts, vocabulary, special_tokens=special_tokens, show_progress=False)
    training = encode(training, tokenizer, max_length)
    validation = encode(validation, tokenizer, max_length)
    inputs, targets = pad(training, max_length)
    validation_data = pad(validation, max_length)

    model = build_model(vocabulary, max_length, *size)
    print(f"{sum(map(len, training)):,} tokens of training text; {sum(map(len, validation)):,} of other documents")
    print(f"{vocabulary:,} byte-pair tokens in the vocabulary; {model.count_params():,} parameters")
    rate = keras.optimizers.schedules.CosineDecay(3e-3, decay_steps=epochs * len(inputs) // 8)
    model.compile(
        optimizer=keras.optimizers.AdamW(rate, weight_decay=0.1, clipnorm=1.0),
        loss=keras_xent.losses.MaskedSequenceCrossentropy(label_smoothing=0.1, ignore_class=PAD),
        # The loss is smoothed, so that exp(loss) is no perplexity. The metric leaves the smoothing out.
        metrics=[keras_xent.metrics.Perplexity(ignore_class=PAD)],
    )
    shutil.rmtree(output / "logs", ignore_errors=True)  # TensorBoard would draw an earlier run into the same curve
    probe = tuple(array[:8] for array in validation_data)
    callbacks = [
        keras_xent.callbacks.TensorBoard(
            output / "logs", update_freq=10, probe=probe, decode=lambda token: tokenizer.decode([token])
        )
    ]
    history = model.fit(
        **shuffled_batches(inputs, targets, 8), epochs=epochs, validation_data=validation_data, callbacks=callbacks
    ).history
    model.save(output / "model.keras")
    tokenizer.save(str(output / "tokenizer.json"))
    np.save(output / "validation.npy", validation_data)
    (output / "history.json").write_text(json.dumps(history, indent=2))
    unigram = unigram_perplexity(training, validation, vocabulary)
    draw_curves(history, unigram, output / "curves.png")

    print("Evaluating the saved model in a fresh process ...")
    command = [sys.executable, __file__, "--evaluate-saved", "--output", output]
    reloaded = float(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    perplexity = history["val_perplexity"][-1]
    np.testing.assert_allclose(reloaded, perplexity, rtol=1e-4)

    prompt = [START, *tokenizer.encode("A class definition").ids]
    text = tokenizer.decode(generate(model, prompt, length=max_length // 2)[1:])
    print(f"It writes: {' '.join(text.split())}")
    print("\nPerplexity of the validation documents, per token")
    print(f"  every token equally likely           {vocabulary:10.4f}")
    print(f"  unigram model of the training text   {unigram:10.4f}")
    print(f"  this model                           {perplexity:10.4f}")
    print(f"  this model in the fresh process      {reloaded:10.4f}")
    print(f"\nFinished in {time.perf_counter() - begin:.0f} s. Curves: {output / 'curves.png'}")
    print(f"TensorBoard: {sys.executable} -m tensorboard.main --logdir {output / 'logs'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="every step at toy size, in seconds")
    parser.add_argument("--epochs", type=int, help="default: 10, and 2 with --smoke")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--output", type=Path, default=Path("demo-output"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--evaluate-saved", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.evaluate_saved:
        print(evaluate_saved(arguments.output))
    else:
        epochs = arguments.epochs or (2 if arguments.smoke else 10)
        main(arguments.output, arguments.smoke, epochs, arguments.seed)
