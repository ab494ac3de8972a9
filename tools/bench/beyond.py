"""Other outputs of a head, measured beside the same from its logits: `python -m tools.bench.beyond memory [NAME ...]`.

`memory` has megabytes above the inputs, compilation included, each in a fresh process; `time` the median ratio of calls
in turn in one process, after one call that compiles; `accuracy` the largest error, over the largest value. The inputs
are those of a head of `TOKENS` tokens; `KERAS_BACKEND` says by what they are computed.
"""

import argparse
import functools
import gc
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import keras
import numpy as np
from keras import ops

import keras_xent as kx
from tools.bench import accuracy, peak

TOKENS, FEATURES, CLASSES, ROUNDS = 8192, 256, 32_000, 7
# Gemma 2's head in miniature: an eighth of the classes, with features and tokens in proportion to the machine.
LORA = {"tokens": 2048, "features": 2304, "classes": 32_000}
SCORE = {"batch": 32, "length": 128, "classes": 131_072}


def _random(*shape, scale=1.0):
    return ops.convert_to_tensor((scale * np.random.default_rng(len(shape)).standard_normal(shape)).astype("float32"))


@functools.cache
def head(tokens=TOKENS, features=FEATURES, classes=CLASSES):
    """Hidden states, kernel and labels."""
    kernel = _random(features, classes, scale=2 / np.sqrt(features))
    return _random(tokens, features), kernel, np.random.default_rng(0).integers(0, classes, tokens).astype("int32")


def step(loss: Callable, *arrays, **options) -> Callable:
    """A compiled call that computes the loss and the gradients for the arrays."""
    if keras.backend.backend() == "jax":
        import jax

        compiled = jax.jit(jax.value_and_grad(loss, tuple(range(len(arrays)))))
        return lambda: jax.block_until_ready(compiled(*arrays))
    import tensorflow as tf

    @functools.partial(tf.function, autograph=False, **options)
    def compiled(*arrays):
        with tf.GradientTape() as tape:
            tape.watch(arrays)
            value = loss(*arrays)
        return value, tape.gradient(value, arrays)

    return lambda: compiled(*arrays)[0].numpy()


def label_loss(names=()):
    """The cross-entropy of labels, with statistics of these names, which a metric reads."""
    hidden, kernel, labels = head()

    def loss(hidden, kernel):
        total, found = kx.kernels.linear_cross_entropy(
            hidden, kernel, labels, reduction="token_mean", return_statistics=names
        )
        return total + 0.0 * sum(ops.stop_gradient(ops.sum(getattr(found, name))) for name in names)

    return step(loss, hidden, kernel)


def dpo(fused):
    """A step of direct preference optimization, of 32 pairs."""
    hidden, kernel, labels = head()
    reference = np.zeros(32, "float32")

    def loss(hidden, kernel):
        if fused:
            log_probs = kx.kernels.linear_token_statistics(hidden, kernel, labels).log_prob
        else:
            logits = ops.matmul(hidden, kernel)
            log_probs = ops.take_along_axis(ops.log_softmax(logits), labels[:, None], axis=1)
        chosen, rejected = ops.split(ops.sum(ops.reshape(log_probs, (64, -1)), axis=1), 2)
        return ops.mean(kx.preference.dpo(chosen, rejected, reference, reference))

    return step(loss, hidden, kernel)


def distillation(fused):
    """Forward KL from a teacher of the student's size, at temperature 2: Keras' formula with distributions."""
    hidden, kernel, _ = head()
    teacher_hidden, teacher_kernel = (_random(*x.shape, scale=0.1) for x in (hidden, kernel))

    def loss(hidden, kernel):
        if fused:
            return kx.kernels.linear_distillation(
                hidden, kernel, teacher_hidden, teacher_kernel, temperature=2.0, reduction="token_mean"
            )
        teacher, student = ops.matmul(teacher_hidden, teacher_kernel), ops.matmul(hidden, kernel)
        p, log_q = ops.softmax(teacher / 2.0), ops.log_softmax(student / 2.0)
        return 4.0 * ops.mean(ops.sum(p * (ops.log_softmax(teacher / 2.0) - log_q), axis=-1))

    return step(loss, hidden, kernel)


def four_matmuls():
    """The products that distillation needs."""
    hidden, kernel, _ = head()
    teacher_hidden, teacher_kernel = (_random(*x.shape, scale=0.1) for x in (hidden, kernel))
    return step(lambda h, k: ops.sum(ops.matmul(h, k) * ops.matmul(teacher_hidden, teacher_kernel)), hidden, kernel)


def top_k():
    """Distillation from the 64 best classes of a teacher."""
    hidden, kernel, _ = head()
    # Tensors: arrays would be constants, which a compiler copies.
    ids = ops.convert_to_tensor(np.random.default_rng(1).integers(0, CLASSES, (TOKENS, 64)).astype("int32"))
    log_probs = ops.convert_to_tensor(np.full((TOKENS, 64), -np.log(64.0), "float32"))

    def loss(hidden, kernel):
        return kx.kernels.linear_top_k_distillation(hidden, kernel, ids, log_probs, reduction="token_mean")

    return step(loss, hidden, kernel)


def lora(factors_only):
    """A head of a model of the size of `LORA`: its two factors of rank 8 train, or its kernel."""
    hidden, kernel, labels = head(**LORA)
    factors = _random(LORA["features"], 8, scale=0.01), _random(8, LORA["classes"], scale=0.01)
    linear = functools.partial(kx.kernels.linear_cross_entropy, reduction="token_mean")
    if factors_only:
        names = ("hidden", "low_rank")
        return step(lambda h, a, b: linear(h, kernel, labels, low_rank=(a, b), gradients=names), hidden, *factors)
    return step(lambda h, k: linear(h, k, labels), hidden, kernel)


def frozen_head():
    """The same head, of which nothing trains."""
    hidden, kernel, labels = head(**LORA)
    linear = functools.partial(kx.kernels.linear_cross_entropy, reduction="token_mean", gradients=("hidden",))
    return step(lambda h: linear(h, kernel, labels), hidden)


def score(fused):
    """The log-probabilities of tokens under a KerasHub model of `SCORE`: its `score`, or `kx.token_log_probs`."""
    import keras_hub

    backbone = keras_hub.models.GPT2Backbone(SCORE["classes"], 1, 2, 64, 128, max_sequence_length=SCORE["length"])
    model = keras_hub.models.GPT2CausalLM(backbone)
    ids = np.random.default_rng(0).integers(1, SCORE["classes"], (SCORE["batch"], SCORE["length"] + 1)).astype("int32")
    mask = np.ones((SCORE["batch"], SCORE["length"]), "int32")
    if fused:
        x = {"token_ids": ids[:, :-1], "padding_mask": mask}
        return lambda: ops.convert_to_numpy(kx.token_log_probs(model, x, ids[:, 1:]))
    return lambda: ops.convert_to_numpy(model.score(ids[:, :-1], mask, scoring_mode="loss", target_ids=ids[:, 1:]))


def metrics(names):
    """A step of `fit` of a head with metrics of these names."""
    made = {
        "Entropy": kx.metrics.Entropy,
        "CalibrationError": kx.metrics.CalibrationError,
        "Perplexity": kx.metrics.Perplexity,
        "Perplexity 2": functools.partial(kx.metrics.Perplexity, name="other"),
    }
    tokens = np.random.default_rng(0).integers(0, CLASSES, (16, TOKENS // 16)).astype("int32")
    model = keras.Sequential([keras.layers.Embedding(CLASSES, FEATURES), kx.layers.LogitsDense(CLASSES)])
    loss = kx.losses.MaskedSequenceCrossentropy()
    model.compile(keras.optimizers.SGD(0.1), loss, metrics=[made[name]() for name in names])
    return lambda: model.train_on_batch(tokens, tokens)


CALLS = {
    "label loss": label_loss,
    "label loss, entropy and log-sum-exp": functools.partial(label_loss, ("entropy", "logsumexp")),
    "DPO": functools.partial(dpo, True),
    "DPO, logits": functools.partial(dpo, False),
    "distillation": functools.partial(distillation, True),
    "distillation, logits": functools.partial(distillation, False),
    "four matmuls": four_matmuls,
    "top-k distillation": top_k,
    "LoRA": functools.partial(lora, True),
    "frozen head": frozen_head,
    "whole head": functools.partial(lora, False),
    "token_log_probs": functools.partial(score, True),
    "KerasHub's score": functools.partial(score, False),
    "fit": functools.partial(metrics, ()),
    "fit, four metrics": functools.partial(metrics, ("Entropy", "CalibrationError", "Perplexity", "Perplexity 2")),
}
# What is divided by what, and the bar.
MEMORY = (
    ("DPO", "DPO, logits", 0.25),
    ("distillation", "distillation, logits", 0.2),
    ("top-k distillation", "label loss", 1.15),
    ("label loss, entropy and log-sum-exp", "label loss", 1.03),
    ("LoRA", "whole head", 0.35),
    ("frozen head", "whole head", 0.35),
    ("token_log_probs", "KerasHub's score", 0.1),
)
TIME = (
    ("label loss, entropy and log-sum-exp", "label loss", 1.03),
    ("DPO", "DPO, logits", 1.0),
    ("distillation", "distillation, logits", 1.0),
    ("distillation", "four matmuls", 1.2),
    ("top-k distillation", "label loss", 1.15),
    ("fit, four metrics", "fit", 1.05),
)


def megabytes(name: str) -> float:
    """By which the memory of this process rises in two calls, compilation included."""
    call = CALLS[name]()
    gc.collect()
    peak.reset()
    start = peak.highest()
    for _ in range(2):
        call()
    return (peak.highest() - start) / 1e6


def in_fresh_process(name: str) -> float:
    """`megabytes` of a process without programs that others have compiled."""
    left_out = ("TF_XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")
    environment = {key: value for key, value in os.environ.items() if key not in left_out}
    command = [sys.executable, "-m", "tools.bench.beyond", "one", name]
    return float(
        subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()[-1]
    )


def ratio_of_times(name: str, other: str, turns: int) -> float:
    """The median of the ratios of calls in turn."""
    calls = CALLS[name](), CALLS[other]()
    ratios = []
    for turn in range(turns + 1):
        times = []
        for call in calls:
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        if turn:
            ratios.append(times[0] / times[1])
    return statistics.median(ratios)


def main() -> None:
    """Prints a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("memory", "time", "accuracy", "one"))
    parser.add_argument("names", nargs="*", help="the work to measure, by the first column; default: all")
    parser.add_argument("--turns", type=int, default=ROUNDS, help="timed calls of each, after one that compiles")
    arguments = parser.parse_args()
    if arguments.what == "one":
        print(megabytes(arguments.names[0]))
    elif arguments.what == "accuracy":
        print("| value, or sum of them | largest error over the largest value | bar |\n|---|--:|--:|")
        for name, error in accuracy.errors(*map(np.asarray, head(512, 64, 4000))).items():
            print(f"| {name} | {error:.1e} | <= 1e-6 |")
    else:
        rows = MEMORY if arguments.what == "memory" else TIME
        print(f"| work | beside | {arguments.what} | bar |\n|---|---|--:|--:|")
        known: dict[str, float] = {}
        for name, other, bar in rows:
            if arguments.names and name not in arguments.names:
                continue
            if arguments.what == "time":
                figure = f"{ratio_of_times(name, other, arguments.turns):.2f}"
            else:
                for one in (name, other):
                    known[one] = known[one] if one in known else in_fresh_process(one)
                figure = f"{known[name]:.0f} / {known[other]:.0f} MB = {known[name] / known[other]:.2f}"
            print(f"| {name} | {other} | {figure} | <= {bar} |", flush=True)


if __name__ == "__main__":
    main()
