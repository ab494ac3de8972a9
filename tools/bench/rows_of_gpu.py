"""The rows that are measured on a GPU, on which Keras runs on JAX."""

from collections.abc import Iterator

from tools.bench import rows, rows_of_outputs
from tools.bench.rows import Work
from tools.bench.shapes import IMAGENET, LARGE_VOCABULARY_BATCH, LLAMA3, MODEL_OF_GPU, SEGMENTATION, TOKENS_OF_GPU
from tools.bench.workers import Library

LIBRARIES = {
    "jax": Library("tools.bench.peers.jax", backend="jax"),
    "pytorch": Library("tools.bench.peers.pytorch"),
}
OF_LOSSES = {"ours": "jax", "optax": "jax", "PyTorch": "pytorch", "torch.compile": "pytorch", "Liger": "pytorch"}
# The logits of the first are rounded to the dtype of the hidden states, as those of Keras' `Dense` in mixed precision.
OF_HEADS = OF_LOSSES | {"optax, rounded logits": "jax", "cut cross-entropy": "pytorch"}
# What a head gives beside its loss; "ours, labels" is its loss alone, timed and not compared.
DENSE = {"Keras": "jax", "PyTorch": "pytorch", "torch.compile": "pytorch"}
LOSS_ALONE = {"ours, labels": "jax"}
OUTPUTS = {
    "policy": ("log-probabilities and entropy", {"ours": "jax"} | LOSS_ALONE | DENSE),
    "dpo": ("DPO", {"ours": "jax"} | LOSS_ALONE | DENSE | {"Liger": "pytorch"}),
    "distillation": ("distillation", {"ours": "jax"} | DENSE | {"Liger": "pytorch"}),
    "top_k": ("distillation of 64 classes", {"ours": "jax"} | LOSS_ALONE | DENSE),
    "likeliest": ("64 likeliest classes", {"ours": "jax"} | DENSE),
}
FLOOR = {"floor": "jax"}
# Calls that are timed together, and rows of the gradients that are compared: whole ones have a gigabyte.
QUEUED, COMPARED = 10, 64


def losses() -> Iterator[Work]:
    """Forward and backward over logits that are there."""
    for shape in SEGMENTATION, IMAGENET, TOKENS_OF_GPU, LARGE_VOCABULARY_BATCH:
        for dtype in rows.DTYPES:
            yield Work("gpu-sparse", _on_gpu(rows.of_loss("sparse", shape, dtype)), OF_LOSSES | FLOOR)
    peers = {name: library for name, library in OF_LOSSES.items() if name != "Liger"}
    for loss in "dense", "sigmoid":
        for dtype in rows.DTYPES:
            yield Work(f"gpu-{loss}", _on_gpu(rows.of_loss(loss, IMAGENET, dtype)), peers | FLOOR)


def heads() -> Iterator[Work]:
    """Forward and backward from hidden states, and the memory that this takes."""
    for head, valid in (MODEL_OF_GPU, 1.0), (MODEL_OF_GPU, 0.15), (LLAMA3, 1.0):
        case = _on_gpu(rows.of_head(head, valid) | {"dtype": "bfloat16"})
        yield Work("gpu-linear", case, OF_HEADS | FLOOR)
        if valid == 1.0:
            yield Work("gpu-memory", case, OF_HEADS, "megabytes")


def outputs() -> Iterator[Work]:
    """What a head gives beside its loss, with gradients, and the memory that this takes."""
    for row, unit in ("gpu-outputs", "milliseconds"), ("gpu-outputs-memory", "megabytes"):
        for question, (output, peers) in OUTPUTS.items():
            case = rows_of_outputs.case_of(question, MODEL_OF_GPU, output=output, beside=[*LOSS_ALONE])
            yield Work(row, _on_gpu(case | {"dtype": "bfloat16"}), peers, unit)


def fits() -> Iterator[Work]:
    """A step of `fit` on JAX."""
    for work in rows.fits():
        if work.case["backend"] == "jax" and work.unit == "milliseconds":
            yield Work("gpu-fit", work.case | {"device": "gpu"}, work.peers)


def _on_gpu(case):
    return case | {"device": "gpu", "queued": QUEUED, "compared": COMPARED}


ROWS = {"gpu-losses": losses, "gpu-heads": heads, "gpu-outputs": outputs, "gpu-fit": fits}
