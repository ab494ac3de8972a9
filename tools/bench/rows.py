"""The measured rows, with their cases and peers."""

from collections.abc import Iterator

from tools.bench import rows_of_outputs
from tools.bench.shapes import GEMMA2, HEADS, LANGUAGE_MODEL, SHAPES, SMALL_MODEL, VALID
from tools.bench.work import Work, of_head, of_loss, of_model

ROUNDS, QUICK_ROUNDS = 9, 3
DTYPES = ("float32", "bfloat16")
SMOOTHING = 0.1
VOCABULARIES = (8192, 32_000, 131_072)
BOTH = ", Perplexity, TokenAccuracy"

# The names of the peers and the libraries that they are in; the first is what the others are compared with.
OF_LOSSES = {
    "ours": "tensorflow",
    "ours, XLA": "tensorflow",
    "ours, JAX": "jax",
    "Keras, graph": "tensorflow",
    "Keras, XLA": "tensorflow",
    "tf.nn": "tensorflow",
    "PyTorch": "pytorch",
    "torch.compile": "pytorch",
    "optax": "jax",
    "floor": "tensorflow",
}
OF_HEADS = {
    "ours": "tensorflow",
    "ours, JAX": "jax",
    "ours, logits, XLA": "tensorflow",
    "Keras, graph": "tensorflow",
    "Keras, XLA": "tensorflow",
    "tf.nn": "tensorflow",
    "PyTorch": "pytorch",
    "torch.compile": "pytorch",
    "PyTorch linear": "pytorch",
    "PyTorch linear, chunked": "pytorch",
    "optax": "jax",
    "tokamax": "tokamax",
    "floor": "tensorflow",
}
OF_CALLBACKS = (
    "no callback",
    "Keras' TensorBoard, every batch",
    "TensorBoard, every batch",
    "TensorBoard, every 50 batches",
    "TensorBoard, every epoch",
    "PerplexityLogger, every 50 batches",
)


def losses(loss: str) -> Iterator[Work]:
    """Forward and backward over logits that are there.

    With smoothing too: everywhere for float32 logits and sparse labels, which elsewhere become dense for it; in the
    other cases for the shape of a language model.
    """
    for shape in SHAPES:
        for dtype in DTYPES:
            yield Work(loss, of_loss(loss, shape, dtype), OF_LOSSES)
            if shape == LANGUAGE_MODEL or (loss == "sparse" and dtype == "float32"):
                yield Work(loss, of_loss(loss, shape, dtype, SMOOTHING), OF_LOSSES)


def heads() -> Iterator[Work]:
    """Forward and backward from hidden states, by the share of valid labels."""
    for head in HEADS:
        for valid in VALID:
            yield Work("linear", of_head(head, valid), OF_HEADS)


def evaluation() -> Iterator[Work]:
    """Forward alone, of a head and of a model."""
    left_out = ("tokamax", "PyTorch linear, chunked")  # for the gradient's sake
    peers = {name: library for name, library in OF_HEADS.items() if name not in left_out}
    yield Work("evaluate", of_head(SMALL_MODEL, gradients=False), peers)
    peers = dict.fromkeys(("ours, head", f"ours, head{BOTH}", "Keras", f"Keras{BOTH}"), "tensorflow")
    yield Work("evaluate-model", of_model("evaluate", "head_fit"), peers)


def transformer() -> Iterator[Work]:
    """A step of `fit` of a small transformer, without metrics and with both."""
    peers = ("ours", f"ours{BOTH}", f"ours, head{BOTH}", "Keras", f"Keras{BOTH}")
    for jit in (False, True):
        yield Work("transformer", of_model("train", "transformer", jit=jit), dict.fromkeys(peers, "tensorflow"))


def fits() -> Iterator[Work]:
    """A step of `fit` with a large vocabulary: its time, and its peak memory."""
    peers = ("ours, head", "Keras")
    for library, jit, valid in (
        ("tensorflow", False, 1.0),
        ("tensorflow", False, 0.15),
        ("tensorflow", True, 1.0),
        ("jax", False, 1.0),
    ):
        case = of_model("train", "head_fit", jit=jit, valid=valid, backend=library)
        yield Work("fit", case, dict.fromkeys(peers, library))
        if valid == 1.0:
            yield Work("fit-memory", {**case, "calls": 2}, dict.fromkeys(peers, library), "megabytes")


def metrics() -> Iterator[Work]:
    """The time that metrics add to a step with a fused head."""
    peers = ("ours, head", "ours, head, Perplexity", f"ours, head{BOTH}")
    for library in "tensorflow", "jax":
        yield Work("metrics", of_model("train", "metrics", backend=library), dict.fromkeys(peers, library))


def callbacks() -> Iterator[Work]:
    """The time that callbacks add to a step of a model small enough for it to show."""
    case = {
        "question": "callbacks",
        "batch": 8,
        "length": 64,
        "rows": 512,
        "features": 64,
        "classes": 2000,
        "steps": 50,
    }
    for library in "tensorflow", "jax":
        yield Work("callbacks", case | {"dtype": "float32", "backend": library}, dict.fromkeys(OF_CALLBACKS, library))


IN_STEPS = dict.fromkeys(("ours", "ours, XLA", "Keras, graph", "Keras, XLA"), "tensorflow")


def first_steps() -> Iterator[Work]:
    """A step with a number of rows that is new, compilation included.

    For "new" numbers a graph of ours has a program, whose rows are more; for each of the larger ones it compiles one.
    """
    larger = {"rows": "larger", "lengths": [320 * 5**i // 4**i + i for i in range(ROUNDS + 2)]}
    for rows in {"rows": "new"}, larger:
        for loss in "sigmoid", "dense", "sparse":
            case = {"question": "new_shape", "loss": loss, **rows, "classes": 1000, "dtype": "float32"}
            yield Work("first-step", case, IN_STEPS)


def first_calls() -> Iterator[Work]:
    """The first call of a graph with a number of rows that is not known: its trace, and what it compiles."""
    for loss in "sigmoid", "dense", "sparse":
        case = {"question": "first_call", "loss": loss, "rows": 64, "classes": 1000, "dtype": "float32"}
        yield Work("first-call", case, dict.fromkeys(("ours", "Keras, graph"), "tensorflow"))


def compilations() -> Iterator[Work]:
    """The number of compilations in steps of varying length: of six lengths, of all in the first epoch, of long ones.

    A program of ours has at least 512 rows of 500 classes, or 262 of 1000: only the long ones need several.
    """
    case = {"question": "lengths", "loss": "sparse", "dtype": "float32"}
    for classes, rows, lengths in (
        (1000, "6 sizes", range(32, 193, 32)),
        (500, "60 sizes", range(40, 513, 8)),
        (500, "60 sizes to 3998", range(578, 3999, 58)),
    ):
        sizes = {"classes": classes, "rows": rows, "lengths": list(lengths), "steps": 60}
        yield Work("compilations", {**case, **sizes}, IN_STEPS, "compilations")


def epochs(question: str) -> Iterator[Work]:
    """An epoch of 60 batches, all of different length: the first, from the making of the model, or a later one."""
    lengths = list(range(5, 65))
    for head in False, True:
        case = {"question": question, "batch": 8, "lengths": lengths, "features": 32, "classes": 500, "head": head}
        peers = {"ours": "tensorflow", "Keras": "tensorflow"}
        yield Work(question.replace("_", "-"), {**case, "dtype": "float32"}, peers)


def uneven() -> Iterator[Work]:
    """A mask that leaves a different number of rows in every step: 150 steps of a graph, its trace included."""
    case = {"question": "uneven", "loss": "sparse", "rows": 512, "classes": 500, "sizes": 150, "dtype": "float32"}
    yield Work("uneven", case, dict.fromkeys(("ours", "Keras, graph"), "tensorflow"))


def many_shapes() -> Iterator[Work]:
    """The memory by which a process has grown after 500 numbers of rows."""
    case = {"question": "new_shape", "loss": "sparse", "rows": "500 sizes", "classes": 1000, "calls": 500}
    peers = dict.fromkeys(("ours", "Keras, graph"), "tensorflow")
    yield Work("many-shapes", {**case, "dtype": "float32"}, peers, "megabytes")


def eager() -> Iterator[Work]:
    """A loss and its gradient outside of a graph, of a small batch and of small pictures."""
    for backend in "tensorflow", "jax":
        for logits in (32, 10), (8, 64, 64, 5):
            case = {"question": "eager", "loss": "sparse", "logits": list(logits), "steps": 20, "backend": backend}
            yield Work("eager", {**case, "dtype": "float32"}, dict.fromkeys(("ours", "Keras"), backend))


def graphs() -> Iterator[Work]:
    """How many operations the graph of a loss and its gradient has, with a number of rows that is not known."""
    for loss in "sparse", "dense", "sigmoid":
        case = {"question": "graph", "loss": loss, "rows": "unknown", "classes": 10, "dtype": "float32"}
        yield Work("graph", case, dict.fromkeys(("ours", "Keras, graph"), "tensorflow"), "operations")


def second_process() -> Iterator[Work]:
    """The first value and gradient of a process, with the programs that another has left on the disk."""
    for backend in "tensorflow", "jax":
        case = {"question": "second_process", "backend": backend}
        yield Work("second-process", case, {"ours, second process": backend, "ours, first process": backend})


def memory() -> Iterator[Work]:
    """Peak memory of the first steps of a loss, in fresh processes."""
    peers = {name: library for name, library in OF_LOSSES.items() if name != "floor"}
    for loss in "sparse", "dense", "sigmoid":
        yield Work("memory", {**of_loss(loss, LANGUAGE_MODEL, "float32"), "calls": 2}, peers, "megabytes")


def vocabulary() -> Iterator[Work]:
    """Peak memory of a head and its loss, by the size of the vocabulary."""
    left_out = ("floor", "tf.nn", "ours, logits, XLA")
    peers = {name: library for name, library in OF_HEADS.items() if name not in left_out}
    for classes in VOCABULARIES:
        name = SMALL_MODEL.name if classes == SMALL_MODEL.classes else "vocabulary"
        head = SMALL_MODEL._replace(name=name, classes=classes)
        yield Work("vocabulary", of_head(head, calls=2), peers, "megabytes")


def largest() -> Iterator[Work]:
    """Peak memory of the largest head: its kernel and its gradient are 2.4 GB each."""
    peers = {"ours": "tensorflow", "PyTorch linear, chunked": "pytorch"}
    yield Work("gemma", of_head(GEMMA2, calls=1), peers, "megabytes")


def imports() -> Iterator[Work]:
    """Processes that import, and end."""
    case = {"question": "import"}
    yield Work("import", case, {"Keras and ours": "import keras, keras_xent", "Keras": "import keras"})


ROWS = {
    "sparse": lambda: losses("sparse"),
    "dense": lambda: losses("dense"),
    "sigmoid": lambda: losses("sigmoid"),
    "linear": heads,
    "transformer": transformer,
    "fit": fits,
    "evaluate": evaluation,
    "metrics": metrics,
    "callbacks": callbacks,
    "first-step": first_steps,
    "compilations": compilations,
    "first-call": first_calls,
    "first-epoch": lambda: epochs("first_epoch"),
    "later-epoch": lambda: epochs("later_epoch"),
    "uneven": uneven,
    "many-shapes": many_shapes,
    "eager": eager,
    "graph": graphs,
    "second-process": second_process,
    "import": imports,
    "memory": memory,
    "vocabulary": vocabulary,
    "gemma": largest,
    **rows_of_outputs.ROWS,
}
