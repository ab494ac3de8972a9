"""Writing a model as a SavedModel that scores."""

import contextlib
import functools
from pathlib import Path
from typing import Any

import keras

from keras_xent import arguments
from keras_xent._backend import without_xla
from keras_xent.deploy import _extra_assets, _signatures

if keras.backend.backend() == "tensorflow":
    import tensorflow as tf

ENDPOINTS = ("serve", "score", "rank", "train_step")


def export_scorer(
    model: Any,
    path: Any,
    *,
    endpoints: tuple[str, ...] = ("serve", "score"),
    compiled: bool = False,
    causal: bool | None = None,
    ignore_class: int | None = None,
    tokenizer: Any = None,
    start_token: int | None = None,
    context: int | None = None,
) -> None:
    """Writes a SavedModel that serves predictions and scores examples wherever TensorFlow runs.

    Neither this package nor Keras is needed to load it. A language model is scored without storing all its logits if
    its output layer is a `LogitsDense` or `TiedLogits`, or the model was given to `keras_xent.fuse_head`.

    Signatures, of a language model with `V` tokens (batch and length may be any, if those of the model's input may):

    - `serve(token_ids [B, T])`: `logits [B, T, V]` (named `probabilities` if they are);
    - `score(token_ids [B, T], mask [B, T])`: of each token but the first, given those before it,
      `token_log_likelihood [B, T - 1]` and `token_mask`, whether it is valid; over the valid tokens `log_likelihood
      [B]`, `num_tokens [B]` and `perplexity [B]`, nan where none is. A token is valid by `mask` (the default is all),
      by `ignore_class`, and by the model's Keras mask;
    - `rank(token_ids, mask)`: `token_rank [B, T - 1]`, how many tokens are more likely, beside `token_log_likelihood`
      and `token_mask`; computing it takes a tenth (compiled) to a third longer than `score`;
    - `train_step(token_ids, targets, sample_weight)`, all `[B, T]`: the `loss`, after a step of the optimizer.

    Of another model: `serve(inputs)`; `score(inputs, labels)`: `loss`, that of `evaluate`, and `per_example_loss`, the
    losses before their reduction; `train_step(inputs, labels, sample_weight [B])`.

    Args:
        model: a Functional or Sequential model with one input and one output.
        path: the folder to write. An earlier SavedModel in it is overwritten.
        endpoints: which of `"serve"`, `"score"`, `"rank"`, `"train_step"`, the default signature first.
        compiled: whether the kernels are compiled by XLA where the model runs: faster, if TensorFlow was built with XLA
            there, and compiled again for each shape of a batch. If False, the SavedModel does not need XLA.
        causal: whether the model predicts the next token. The default is True for a model from `[B, T]` to `[B, T, V]`,
            so that taggers and masked language models have to say False.
        ignore_class: the token that is padding. The default is that of the model's loss.
        tokenizer: for scoring text with `python -m keras_xent.deploy`: a `tokenizers.Tokenizer`, or its JSON file.
        start_token: the token that begins a text, if the model was trained with one.
        context: the most tokens that the model can be given, if there is a limit.

    Returns:
        None.

    Raises:
        ValueError: a model or an argument that cannot be exported; Keras does not run on TensorFlow.

    Example:

    >>> import tempfile
    >>> import keras
    >>> import keras_xent as kx
    >>> model = keras.Sequential([keras.Input((None,)), keras.layers.Embedding(100, 8), kx.layers.LogitsDense(100)])
    >>> folder = tempfile.mkdtemp()
    >>> kx.deploy.export_scorer(model, folder)
    >>> scorer = kx.deploy.load_scorer(folder)
    >>> scorer.score([[3, 14, 15], [9, 2, 6]])["token_log_likelihood"].shape
    (2, 2)
    """
    if keras.backend.backend() != "tensorflow":
        raise ValueError(
            "`export_scorer` writes the programs of Keras on TensorFlow, and Keras runs on "
            f"'{keras.backend.backend()}'. Save the model with `model.save('model.keras')`, and load and export it in "
            "a process with the environment variable KERAS_BACKEND=tensorflow."
        )
    if Path(path).is_file():
        raise ValueError(f"`path` must be a folder, which is made if it is missing. Received: the file '{path}'.")
    endpoints = _checked_endpoints(endpoints)
    compiled = arguments.boolean("compiled", compiled)
    causal = _is_causal(model, causal)
    if ignore_class is None and _signatures.is_sparse(model.loss):
        ignore_class = getattr(model.loss, "ignore_class", None)
    ignore_class = arguments.class_or_none("ignore_class", ignore_class)
    _check_loss(model, endpoints, causal)
    num_classes = model.outputs[0].shape[-1]
    length = model.inputs[0].shape[1] if causal else None
    metadata = {
        "causal": causal,
        "ignore_class": ignore_class,
        "num_classes": num_classes,
        "start_token": _in_range("start_token", start_token, 0, num_classes),
        "context": _in_range("context", context, 1, length and length + 1),
    }
    # Read before anything is written: it may be the one of an earlier export to the same folder.
    tokenizer = _tokenizer_json(tokenizer)
    if length is not None:
        arguments.warn(
            f"`model` takes exactly {length} tokens, and so does what is exported: `score` takes token_ids of shape "
            f"[B, {length + 1}]. `load_scorer` pads shorter texts to that; other callers have to, with `mask` False. "
            "For texts of any length make the model with `keras.Input([None])`."
        )
    signatures = _signatures.causal_lm(model, ignore_class) if causal else _signatures.supervised(model)
    archive = keras.export.ExportArchive()
    archive.track(model)
    if "train_step" in endpoints:
        model.optimizer.build(model.trainable_variables)
    for name in endpoints:
        function, specs = signatures[name]
        archive.add_endpoint(name, _with_kernels(function, compiled), specs)
    # The kernels' gradients would be traced while saving: by XLA, and to the second order, which some do not have.
    options = tf.saved_model.SaveOptions(experimental_custom_gradients=False)
    archive.write_out(str(path), options=options, verbose=False)
    _extra_assets.write(Path(path), metadata, tokenizer)


def _with_kernels(function, compiled):
    """The function, tracing its kernels as programs of XLA or as plain operations."""

    @functools.wraps(function)
    def traced(*inputs):
        with contextlib.nullcontext() if compiled else without_xla():
            return function(*inputs)

    return traced


def _tokenizer_json(tokenizer):
    if tokenizer is None or hasattr(tokenizer, "to_str"):
        return tokenizer and tokenizer.to_str()
    return Path(tokenizer).read_text(encoding="utf-8")


def _checked_endpoints(endpoints):
    names = (endpoints,) if isinstance(endpoints, str) else tuple(endpoints)
    if not names or not set(names) <= set(ENDPOINTS) or len(set(names)) < len(names):
        raise ValueError(
            f"`endpoints` must be some of {', '.join(map(repr, ENDPOINTS))}, each once. Received: {endpoints!r}."
        )
    return names


def _is_causal(model, causal):
    inputs, outputs = (getattr(model, name, None) or [] for name in ("inputs", "outputs"))
    if len(inputs) != 1 or len(outputs) != 1:
        raise ValueError(
            "`model` must be a built Functional or Sequential model with one input and one output. "
            f"Received: {type(model).__name__}. Make one around it, such as "
            "`tokens = keras.Input([None], dtype='int32'); keras.Model(tokens, model(tokens))`."
        )
    possible = len(inputs[0].shape) == 2 and len(outputs[0].shape) == 3
    if causal is None:
        return possible
    if arguments.boolean("causal", causal) and not possible:
        raise ValueError(
            "`causal` must be False for a model that does not predict a token for each of its inputs, from shape "
            "[B, T] to [B, T, V]. Received: causal=True and a model from "
            f"{inputs[0].shape} to {outputs[0].shape}."
        )
    return causal


def _check_loss(model, endpoints, causal):
    if "rank" in endpoints and not causal:
        raise ValueError(
            "`endpoints` may hold 'rank' for a language model only, and `model` has labels (causal=False)."
        )
    needed = "train_step" in endpoints or ("score" in endpoints and not causal)
    if needed and (model.loss is None or isinstance(model.loss, dict | list | tuple)):
        raise ValueError(
            f"`model` must be compiled with one loss for the endpoints {endpoints}. Received: loss={model.loss!r}. "
            "Compile it first, or export fewer `endpoints`."
        )
    if "train_step" in endpoints and model.optimizer is None:
        raise ValueError("`model` must be compiled with an optimizer for the endpoint 'train_step'.")


def _in_range(name, value, least, below=None):
    """`value`, if it is None or a whole number in the range."""
    number = arguments.class_or_none(name, value)
    if number is not None and (number < least or (below is not None and number >= below)):
        bound = "" if below is None else f" and below {below}"
        raise ValueError(f"`{name}` must be None or a whole number of at least {least}{bound}. Received: {value!r}.")
    return number
