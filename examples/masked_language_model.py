"""Train a small masked language model, and see that a step takes less time where fewer labels are valid.

    python examples/masked_language_model.py            # about three minutes on two cores
    python examples/masked_language_model.py --smoke    # the same steps at toy size, in seconds

The text is that of language_model.py. As in BERT, 15 % of the tokens are predicted, each from the text on both sides of
it, and the labels of the others are -1. `LogitsDense` and the loss then make no logits at all for these others.
"""

import argparse
import time

import keras
import numpy as np
from language_model import PAD, encode, read_documents, unigram_perplexity
from tokenizers import ByteLevelBPETokenizer

import keras_xent as kx

MASK, SPECIAL_TOKENS = 1, ["[PAD]", "[MASK]"]  # numbers 0 and 1
IGNORED = -1


def mask_tokens(tokens, vocabulary, rng, share=0.15):
    """Inputs and labels `[B, T]` by BERT's recipe (arXiv:1810.04805): of the tokens, `share` have a label.

    Of these, 80 % are replaced by [MASK], 10 % by a random token, and 10 % stay as they are.
    """
    chosen = (rng.random(tokens.shape) < share) & (tokens != PAD)
    fate = rng.random(tokens.shape)
    inputs = np.where(chosen & (fate < 0.8), MASK, tokens)
    random = rng.integers(len(SPECIAL_TOKENS), vocabulary, tokens.shape)
    inputs = np.where(chosen & (fate >= 0.9), random, inputs)
    return inputs.astype("int32"), np.where(chosen, tokens, IGNORED).astype("int32")


class MaskedBatches(keras.utils.PyDataset):
    """Training batches: each epoch sees the sequences in another order, and other tokens masked."""

    def __init__(self, tokens, vocabulary, batch_size):
        super().__init__()
        self.tokens, self.vocabulary, self.batch_size = tokens, vocabulary, batch_size
        self.rng = np.random.default_rng(0)
        self.on_epoch_end()

    def on_epoch_end(self):
        self.inputs, self.labels = mask_tokens(self.rng.permutation(self.tokens), self.vocabulary, self.rng)

    def __len__(self):
        return len(self.tokens) // self.batch_size

    def __getitem__(self, index):
        batch = slice(index * self.batch_size, (index + 1) * self.batch_size)
        return self.inputs[batch], self.labels[batch]


def build_model(vocabulary, length, layers, width, heads):
    """A bidirectional transformer of standard Keras layers, with a head that materializes no logits in training."""
    tokens = keras.Input([length], dtype="int32", name="tokens")
    x = keras.layers.Embedding(vocabulary, width, mask_zero=True)(tokens)
    positions = keras.ops.cumsum(keras.ops.ones_like(tokens), axis=1) - 1
    x = keras.layers.Add()([x, keras.layers.Embedding(length, width)(positions)])
    for _ in range(layers):
        h = keras.layers.LayerNormalization()(x)
        h = keras.layers.MultiHeadAttention(heads, width // heads)(h, h)
        x = keras.layers.Add()([x, h])
        h = keras.layers.LayerNormalization()(x)
        h = keras.layers.Dense(4 * width, activation="gelu")(h)
        h = keras.layers.Dense(width)(h)
        x = keras.layers.Add()([x, h])
    x = keras.layers.LayerNormalization()(x)
    return keras.Model(tokens, kx.layers.LogitsDense(vocabulary, name="logits")(x))


def time_steps(shares, vocabulary, tokens, width, steps):
    """Median seconds of a training step of the head alone, for each share of valid labels.

    The hidden states are random numbers in an embedding, so that the step also makes the gradient for them. The head
    takes the valid labels in chunks of some hundred, and a chunk that is not full costs as much as a full one.
    """
    model = keras.Sequential([keras.layers.Embedding(tokens, width), kx.layers.LogitsDense(vocabulary)])
    model.compile(keras.optimizers.SGD(), loss=kx.losses.MaskedSequenceCrossentropy(ignore_class=IGNORED))
    rng = np.random.default_rng(0)
    inputs = np.arange(tokens, dtype="int32")[None]
    labels = rng.integers(0, vocabulary, (1, tokens), "int32")
    order = rng.permutation(tokens)[None]
    labeled = {share: np.where(order < share * tokens, labels, IGNORED) for share in shares}
    model.train_on_batch(inputs, labeled[min(shares)])  # the first step compiles
    seconds = {share: [] for share in shares}
    for _ in range(steps):
        for share in shares:  # in turn, so that a busy machine slows all of them
            begin = time.perf_counter()
            float(model.train_on_batch(inputs, labeled[share]))
            seconds[share].append(time.perf_counter() - begin)
    return {share: float(np.median(found)) for share, found in seconds.items()}


def main(smoke, epochs, seed):
    """Train, compare with the unigram model, and time the head."""
    begin = time.perf_counter()
    keras.utils.set_random_seed(seed)
    documents, vocabulary, length, batch_size = (16, 400, 64, 16) if smoke else (None, 1000, 64, 16)
    size = (1, 32, 2) if smoke else (2, 96, 4)

    training, validation = read_documents(documents)
    tokenizer = ByteLevelBPETokenizer()
    texts = (text for paragraphs in training for text in paragraphs)
    tokenizer.train_from_iterator(texts, vocabulary, special_tokens=SPECIAL_TOKENS, show_progress=False)
    training, validation = encode(training, tokenizer, length), encode(validation, tokenizer, length)
    padded = keras.utils.pad_sequences(training, length, padding="post", value=PAD)
    batches = MaskedBatches(padded, vocabulary, batch_size)
    # Four copies, so that more of the held-out tokens are asked for.
    padded = keras.utils.pad_sequences(4 * validation, length, padding="post", value=PAD)
    inputs, labels = mask_tokens(padded, vocabulary, np.random.default_rng(1))

    model = build_model(vocabulary, length, *size)
    print(f"{sum(map(len, training)):,} tokens of training text; {sum(map(len, validation)):,} of other documents")
    print(f"{vocabulary:,} byte-pair tokens in the vocabulary; {model.count_params():,} parameters")
    rate = keras.optimizers.schedules.CosineDecay(
        0.0, epochs * len(batches), warmup_target=3e-3, warmup_steps=len(batches)
    )
    model.compile(
        optimizer=keras.optimizers.AdamW(rate, weight_decay=0.1, clipnorm=1.0),
        loss=kx.losses.MaskedSequenceCrossentropy(ignore_class=IGNORED),
        # Both use the statistics of the loss. Keras' "accuracy" would need the logits of every token.
        metrics=[kx.metrics.Perplexity(ignore_class=IGNORED), kx.metrics.TokenAccuracy(ignore_class=IGNORED)],
    )
    history = model.fit(
        batches, epochs=epochs, validation_data=(inputs, labels), validation_batch_size=64, verbose=2
    ).history

    unigram = unigram_perplexity(training, [labels[labels != IGNORED]], vocabulary)
    print("\nMasked tokens of the validation documents")
    print(f"  perplexity, every token equally likely           {vocabulary:10.4f}")
    print(f"  perplexity, unigram model of the training text   {unigram:10.4f}")
    print(f"  perplexity, this model                           {history['val_perplexity'][-1]:10.4f}")
    print(f"  accuracy, this model                             {history['val_token_accuracy'][-1]:10.4f}")

    classes, tokens, width, steps = (32_000, 1536, 8, 3) if smoke else (32_000, 3072, 64, 3)
    seconds = time_steps((1.0, 0.5, 0.15), classes, tokens, width, steps)
    print(f"\nA training step of the head alone: {tokens:,} tokens, {classes:,} classes, median of {steps}")
    for share, median in seconds.items():
        print(f"  {share:4.0%} of the labels valid {1e3 * median:8.0f} ms")
    print(f"\nFinished in {time.perf_counter() - begin:.0f} s.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="every step at toy size, in seconds")
    parser.add_argument("--epochs", type=int, help="default: 10, and 1 with --smoke")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    arguments = parser.parse_args()
    main(arguments.smoke, arguments.epochs or (1 if arguments.smoke else 10), arguments.seed)
