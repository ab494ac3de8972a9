"""Scoring with a SavedModel of ours: single batches, and documents longer than what the model can be given."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from keras_xent.deploy.export import ABOUT, EXTRA, TOKENIZER

# Tokens of a window where neither the model nor the caller says how many.
_CONTEXT = 512


def load_scorer(path: Any) -> "Scorer":
    """The scorer that `export_scorer` has written to `path`.

    A SavedModel is a program, and TensorFlow's loader and runtime are all that runs it: nothing is unpickled, and what
    lies beside it is read as JSON. Load one from somebody you do not trust as you would run theirs.

    Raises:
        ValueError: no SavedModel, one that TensorFlow cannot load, or one without our signature.

    Example:

    >>> import keras_xent as kx
    >>> kx.deploy.load_scorer("model.keras")
    Traceback (most recent call last):
    ValueError: `path` must be a folder that `export_scorer` has written. Received: 'model.keras', ...
    """
    folder = Path(path)
    if not (folder / "saved_model.pb").is_file():
        what = "which is no folder with a saved_model.pb"
        if folder.suffix in (".keras", ".h5"):
            what = "a file of Keras: load it with `keras.models.load_model`, and export the model"
        raise ValueError(f"`path` must be a folder that `export_scorer` has written. Received: '{path}', {what}.")
    # On JAX, TensorFlow is imported by nobody else.
    import tensorflow as tf

    try:
        loaded = tf.saved_model.load(str(folder))
    # Nobody says what the loader raises.
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"TensorFlow cannot load the SavedModel '{path}' ({reason.rstrip('.')}). Export the model again."
        ) from error
    signatures = getattr(loaded, "signatures", {})
    if "score" not in signatures:
        names = ", ".join(map(repr, signatures)) or "none"
        raise ValueError(
            f"The SavedModel '{path}' has no signature 'score'. Received: {names}. Write it with "
            "`keras_xent.deploy.export_scorer`, 'score' among its `endpoints`."
        )
    return Scorer(loaded, folder)


class Window(NamedTuple):
    """A part of a document that is scored at once: `ids[begin:end]`, of which those from `fresh` on are new."""

    begin: int
    fresh: int
    end: int


class Scorer:
    """A loaded SavedModel. Made by `load_scorer`.

    Attributes:
        causal: whether it scores tokens, given those before them.
        num_classes, ignore_class, start_token, context: as it was exported; None where that is not known.
        tokenizer: the path of the tokenizer's file; None if there is none.
    """

    def __init__(self, loaded: Any, folder: Path) -> None:
        # Functions of a SavedModel need it alive.
        self._loaded = loaded
        self._score = loaded.signatures["score"]
        about = _read_json(folder / EXTRA / ABOUT)
        self._inputs = self._score.structured_input_signature[1]
        self.causal: bool = set(self._inputs) == {"token_ids", "mask"}
        if not self.causal and set(self._inputs) != {"inputs", "labels"}:
            raise ValueError(
                f"The signature 'score' of the SavedModel '{folder}' takes {sorted(self._inputs)}, and that of "
                "`export_scorer` takes token_ids and mask, or inputs and labels. Export the model with it."
            )
        self.num_classes: int | None = about.get("num_classes")
        self.ignore_class: int | None = about.get("ignore_class")
        self.start_token: int | None = about.get("start_token")
        self.context: int | None = about.get("context")
        beside = folder / EXTRA / TOKENIZER
        self.tokenizer: Path | None = beside if beside.is_file() else None

    def score(self, inputs: Any, labels: Any = None, *, mask: Any = None) -> dict[str, np.ndarray]:
        """The outputs of the signature `score`: of `token_ids [B, T]` and a mask, or of inputs and their labels."""
        first, second = ("token_ids", "mask") if self.causal else ("inputs", "labels")
        other, unknown = (mask, labels) if self.causal else (labels, mask)
        if unknown is not None:
            raise ValueError(f"`score` of this model takes `{first}` and `{second}`.")
        given = {first: self._checked(first, inputs)}
        if self.causal:
            other = np.ones(given[first].shape, bool) if mask is None else mask
        given[second] = self._checked(second, other)
        if self.causal:
            if given["mask"].shape != given["token_ids"].shape:
                raise ValueError(
                    f"`mask` must have the shape of `token_ids`. Received: {given['mask'].shape} and "
                    f"{given['token_ids'].shape}."
                )
            self._check_tokens(given["token_ids"], given["mask"])
        return self._run(given)

    def score_document(
        self,
        ids: Any,
        *,
        context: int | None = None,
        stride: int | None = None,
        batch_size: int = 8,
        progress: Callable[[int], Any] | None = None,
    ) -> np.ndarray:
        """The log-likelihood of each token of one document of any length, `[T]`, in float64.

        It is nan for tokens that are not scored: the first, unless a start token comes before it, and `ignore_class`.

        The document is scored in windows of `context + 1` tokens that move on by `stride` tokens. Each token is scored
        once, in the first window that holds it, given at least `context - stride + 1` tokens where there are as many.

        Args:
            ids: the tokens, `[T]`. The start token of the export, if it has one, is put before them.
            context: the most tokens that are given; by default what the export says, else 512.
            stride: from 1, the most context and the most work, to `context`, the least; by default half of `context`.
            batch_size: how many windows are scored at once.
            progress: is called with the number of tokens that have been scored since the last call.

        Raises:
            ValueError: arguments or tokens out of their range; a model that gives no numbers.
        """
        if not self.causal:
            raise ValueError("`score_document` needs a language model, and this one scores inputs with labels.")
        context = context or self.context or _CONTEXT
        stride = stride or max(1, context // 2)
        if not 1 <= stride <= context or batch_size < 1:
            raise ValueError(
                "`context`, `stride` and `batch_size` must be at least 1, and `stride` at most `context`. Received: "
                f"context={context}, stride={stride} and batch_size={batch_size}."
            )
        tokens = self._checked("token_ids", np.asarray(ids).reshape(1, -1) if len(ids) else np.zeros((1, 0), "int32"))
        self._check_tokens(tokens, np.ones(tokens.shape, bool))
        if self.start_token is not None:
            tokens = np.insert(tokens, 0, self.start_token, axis=1)
        tokens = tokens[0]
        result, wanted = np.full(len(tokens), np.nan), np.arange(len(tokens)) > 0
        if self.ignore_class is not None:
            wanted &= tokens != self.ignore_class
        all_windows = list(windows(len(tokens), context, stride))
        for first in range(0, len(all_windows), batch_size):
            batch = all_windows[first : first + batch_size]
            mask = np.stack([np.arange(w.begin, w.end) >= w.fresh for w in batch])
            scored = self._run({"token_ids": np.stack([tokens[w.begin : w.end] for w in batch]), "mask": mask})
            for window, values in zip(batch, scored["token_log_likelihood"], strict=True):
                result[window.fresh : window.end] = values[window.fresh - window.end :]
            if progress is not None:
                progress(sum(w.end - w.fresh for w in batch))
        if np.isnan(result[wanted]).any():
            place = int(np.flatnonzero(wanted & np.isnan(result))[0]) - (self.start_token is not None)
            raise ValueError(
                f"The model's log-likelihood of token {place} is not a number: look for NaN in its weights."
            )
        result[~wanted] = np.nan
        return result if self.start_token is None else result[1:]

    def _run(self, given):
        import tensorflow as tf

        tensors = {name: tf.constant(value, self._inputs[name].dtype) for name, value in given.items()}
        try:
            scored = self._score(**tensors)
        except tf.errors.OpError as error:
            shape = next(iter(given.values())).shape
            raise ValueError(
                f"The model cannot score an input of shape {shape} ({_reason(error)}). If that is too much for it, "
                "give it less at once: a smaller `context`, a smaller batch."
            ) from error
        return {name: value.numpy() for name, value in scored.items()}

    def _checked(self, name, value):
        """The array, if the signature takes it."""
        spec, fits = self._inputs[name], False
        try:
            array = np.asarray(value)
        except ValueError:
            raise ValueError(f"`{name}` must be rows of one length. Received: rows of uneven length.") from None
        kinds = {"i": "iu", "b": "b"}.get(spec.dtype.as_numpy_dtype().dtype.kind, "fiu")
        if array.dtype.kind in kinds or array.size == 0:
            fits = spec.shape.is_compatible_with(array.shape)
        if not fits:
            shape = [size if size is not None else "any" for size in spec.shape]
            raise ValueError(
                f"`{name}` must have dtype {spec.dtype.name} and shape ({', '.join(map(str, shape))}). "
                f"Received: dtype {array.dtype} and shape {array.shape}."
            )
        return array

    def _check_tokens(self, token_ids, mask):
        if self.num_classes is None:
            return
        bad = mask & ((token_ids < 0) | (token_ids >= self.num_classes))
        if self.ignore_class is not None:
            bad &= token_ids != self.ignore_class
        if bad.any():
            place = tuple(int(i) for i in np.argwhere(bad)[0])
            raise ValueError(
                f"`token_ids` must be numbers from 0 to {self.num_classes - 1}, since the model knows "
                f"{self.num_classes} tokens. Received: {token_ids[place]} at position {place}. A tokenizer that gives "
                "it belongs to another model."
            )


def windows(length: int, context: int, stride: int) -> Iterator[Window]:
    """Windows of at most `context + 1` tokens that score each token but the first once.

    Example:

    >>> from keras_xent.deploy.scorer import windows
    >>> [tuple(window) for window in windows(8, context=4, stride=2)]
    [(0, 1, 5), (2, 5, 7), (3, 7, 8)]
    """
    fresh = 1
    while fresh < length:
        end = min(length, fresh + (context if fresh == 1 else stride))
        yield Window(max(0, end - context - 1), fresh, end)
        fresh = end


def _reason(error):
    """What an error of a graph says, without where the graph was."""
    others = ("Graph execution error", "Detected at", "<stack traces", "\t")
    lines = [line for line in str(error.message).splitlines() if line.strip() and not line.startswith(others)]
    return lines[0].partition(" [[")[0].rstrip(".") if lines else type(error).__name__


def _read_json(path):
    """What is known of the model; nothing, if it comes from elsewhere."""
    if not path.is_file():
        return {}
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        known = {name: about[name] for name in ("num_classes", "ignore_class", "start_token", "context")}
    except (ValueError, TypeError, KeyError):
        known = None
    if known is None or not all(value is None or type(value) is int for value in known.values()):
        raise ValueError(f"'{path}' is not what `export_scorer` writes. Export the model again.")
    return known
