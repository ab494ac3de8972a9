"""Teach a small language model by a larger one: what it learns from the teacher's probabilities beside the text itself.

    python examples/language_model_distillation.py            # a few minutes on two cores
    python examples/language_model_distillation.py --smoke    # the same steps at toy size

The model of language_model.py is trained on Python's language reference, and is the teacher. Two students of a fraction
of its size start from the same weights and see the same batches. One learns from the text, which names one next token.
The other learns from the teacher too (`keras.distillation.Distiller`), which says how likely each token is. Both are
compared on other documents, and with a unigram model, which never changes.

No logits are materialized, the teacher's or the student's: `kx.fuse_head` lets losses and metrics go without them.
"""

import argparse
from pathlib import Path

import keras
import matplotlib
from language_model import PAD, build_model, encode, pad, read_documents, shuffled_batches, unigram_perplexity
from tokenizers import ByteLevelBPETokenizer

import keras_xent as kx

matplotlib.use("Agg")  # draws into a file, on machines without a screen too
from matplotlib import pyplot


def read_tokens(limit, vocabulary, length):
    """Sequences of tokens of uneven length, for training and of other documents."""
    training, validation = read_documents(limit)
    tokenizer = ByteLevelBPETokenizer()
    texts = (text for paragraphs in training for text in paragraphs)
    tokenizer.train_from_iterator(texts, vocabulary, special_tokens=["[PAD]", "[START]"], show_progress=False)
    return encode(training, tokenizer, length), encode(validation, tokenizer, length)


def compiled(model, rate):
    """The model, ready to be trained on text; the loss is that of every model here."""
    loss = kx.losses.MaskedSequenceCrossentropy(ignore_class=PAD)
    model.compile(keras.optimizers.Adam(rate), loss, metrics=[kx.metrics.Perplexity(ignore_class=PAD)])
    return model


def distiller_of(teacher, student, rate):
    """Keras' own, with a loss that compares distributions and needs no logits."""
    distiller = keras.distillation.Distiller(
        teacher, student, kx.distillation.LogitsDistillation(temperature=2.0), student_loss_weight=0.3
    )
    return compiled(distiller, rate)


def main(output, smoke, seed=0):
    """Train the teacher and both students; the perplexities on other documents, by name, after each epoch."""
    output.mkdir(parents=True, exist_ok=True)
    limit, vocabulary, length = (24, 400, 32) if smoke else (None, 1000, 128)
    large, small, epochs = ((1, 48, 2), (1, 12, 2), 6) if smoke else ((2, 96, 4), (1, 32, 2), 8)
    training, validation = read_tokens(limit, vocabulary, length)
    (inputs, targets), held_out = pad(training, length), pad(validation, length)

    def fit(name, model):
        print(f"Training the {name} ...", flush=True)
        batches = shuffled_batches(inputs, targets, 8)
        return model.fit(**batches, epochs=epochs, validation_data=held_out, verbose=2).history["val_perplexity"]

    def student():
        keras.utils.set_random_seed(seed + 1)
        return kx.fuse_head(build_model(vocabulary, length, *small, dropout=0.0))

    keras.utils.set_random_seed(seed)
    teacher = kx.fuse_head(build_model(vocabulary, length, *large))
    # A student is made just before its training, so that the order of batches comes from its seed.
    curves = {"teacher": fit("teacher", compiled(teacher, 3e-3))}
    curves["student of the text"] = fit("student of the text", compiled(student(), 3e-3))
    distilled = student()
    curves["student of the teacher"] = fit("student of the teacher", distiller_of(teacher, distilled, 3e-3))
    unigram = unigram_perplexity(training, validation, vocabulary)

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for name, perplexities in curves.items():
        axes.plot(range(1, epochs + 1), perplexities, marker="o", label=name)
    axes.axhline(unigram, color="gray", linestyle="--", label="unigram model")
    axes.set(xlabel="epoch", ylabel="perplexity per token, other documents", yscale="log")
    axes.yaxis.set_major_formatter("{x:.0f}")
    axes.yaxis.set_minor_formatter("{x:.0f}")
    axes.legend()
    figure.savefig(output / "distillation.png", dpi=100)
    sizes = {"teacher": teacher.count_params()} | dict.fromkeys(list(curves)[1:], distilled.count_params())
    print("Perplexity of other documents, per token\n" + f"  {'unigram model':24}{'':21}{unigram:9.2f}")
    for name, perplexities in curves.items():
        print(f"  {name:24}{sizes[name]:9,} parameters{perplexities[-1]:10.2f}")
    print(f"Curves: {output / 'distillation.png'}")
    return curves | {"unigram model": [unigram]}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="every step at toy size")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("demo-output/language_model_distillation"),
        metavar="DIR",
        help="default: %(default)s",
    )
    arguments = parser.parse_args()
    main(arguments.output, arguments.smoke, arguments.seed)
