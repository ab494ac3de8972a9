"""Scoring with an exported SavedModel: single batches, and documents longer than the model's context."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from keras_xent import arguments
from keras_xent.deploy import _extra_assets
from keras_xent.deploy._windows import windows

# Tokens of a window where neither the model nor the caller says how many.
_DEFAULT_CONTEXT = 512


class Scorer:
    """A loaded SavedModel that scores token ids, or examples with labels. Returned by `load_scorer`.

    Attributes:
        causal: whether the model predicts each token from those before it.
        num_classes, ignore_class, start_token, context: settings of the export; None where they are not known.
        batch, length: the number of texts, and of tokens in each, that the model takes; None if any number. Smaller
            batches and shorter texts are padded.
        tokenizer: the path of the tokenizer's file; None if there is none.

    Example:

    >>> import tempfile
    >>> import keras
    >>> import keras_xent as kx
    >>> model = keras.Sequential([keras.Input((None,)), keras.layers.Embedding(100, 8), kx.layers.LogitsDense(100)])
    >>> folder = tempfile.mkdtemp()
    >>> kx.deploy.export_scorer(model, folder)
    >>> scorer = kx.deploy.load_scorer(folder)
    >>> scorer.score_document([3, 14, 15, 92, 65]).shape
    (5,)
    """

    def __init__(self, loaded: Any, folder: Path) -> None:
        # Functions of a SavedModel need it alive.
        self._loaded = loaded
        self._signatures = loaded.signatures
        self._inputs = loaded.signatures["score"].structured_input_signature[1]
        self.causal: bool = set(self._inputs) == {"token_ids", "mask"}
        if not self.causal and set(self._inputs) != {"inputs", "labels"}:
            raise ValueError(
                f"The signature 'score' of the SavedModel '{folder}' takes {sorted(self._inputs)}, and that of "
                "`export_scorer` takes token_ids and mask, or inputs and labels. Export the model with it."
            )
        if self.causal and "token_mask" not in loaded.signatures["score"].structured_outputs:
            raise ValueError(
                f"The signature 'score' of the SavedModel '{folder}' does not tell which tokens it has scored "
                "(`token_mask`). Export the model again."
            )
        metadata, self.tokenizer = _extra_assets.read(folder)
        self.num_classes: int | None = metadata.get("num_classes")
        self.ignore_class: int | None = metadata.get("ignore_class")
        self.start_token: int | None = metadata.get("start_token")
        self.context: int | None = metadata.get("context")
        self.batch: int | None = None
        self.length: int | None = None
        if self.causal:
            self.batch, length = self._inputs["token_ids"].shape
            self.length = None if length is None else length - 1

    def score(self, inputs: Any, labels: Any = None, *, mask: Any = None) -> dict[str, np.ndarray]:
        """The outputs of the signature `score`: of `token_ids [B, T]` and a mask, or of inputs and their labels."""
        first, second = ("token_ids", "mask") if self.causal else ("inputs", "labels")
        other, unexpected = (mask, labels) if self.causal else (labels, mask)
        if unexpected is not None:
            raise ValueError(f"`score` of this model takes `{first}` and `{second}`.")
        if self.causal:
            return self._score_padded("score", *self._checked_tokens(inputs, mask))
        return self._run("score", {first: self._checked(first, inputs), second: self._checked(second, other)})

    def serve(self, inputs: Any) -> np.ndarray:
        """The output of the signature `serve`: the logits or probabilities of `token_ids [B, T]`, or of inputs."""
        if not self.has("serve"):
            raise ValueError("The SavedModel has no signature 'serve'. Export the model with it in `endpoints`.")
        if not self.causal:
            return next(iter(self._run("serve", {"inputs": self._checked("inputs", inputs)}).values()))
        token_ids, _ = self._checked_tokens(inputs, None)
        rows, length = token_ids.shape
        padding = _padding((self.batch, self.length), token_ids.shape)
        served = self._run("serve", {"token_ids": np.pad(token_ids, padding)})
        return next(iter(served.values()))[:rows, :length]

    def has(self, signature: str) -> bool:
        """Returns whether the SavedModel was exported with this signature."""
        return signature in self._signatures

    def rank(self, token_ids: Any, *, mask: Any = None) -> dict[str, np.ndarray]:
        """The outputs of the signature `rank`: how many tokens are more likely than each of `token_ids [B, T]`."""
        if not self.has("rank"):
            raise ValueError("The SavedModel has no signature 'rank'. Export a language model with it in `endpoints`.")
        return self._score_padded("rank", *self._checked_tokens(token_ids, mask))

    def score_document(
        self,
        ids: Any,
        *,
        context: int | None = None,
        stride: int | None = None,
        batch_size: int = 8,
        start_in_every_window: bool = False,
        progress: Callable[[int], Any] | None = None,
    ) -> np.ndarray:
        """The log-likelihood of each token of one document of any length, `[T]`, in float64.

        It is nan for tokens that are not scored: the first, unless a start token comes before it, `ignore_class`, and
        those that the model's own Keras mask leaves out.

        The document is scored in windows of `context + 1` tokens that move on by `stride` tokens. Each token is scored
        once, in the first window that holds it, given at least `context - stride + 1` tokens where there are as many.

        Args:
            ids: the tokens, `[T]`. The start token of the export, if it has one, is put before them.
            context: the most tokens that are given, at most what the export says, which is the default; else 512.
            stride: from 1, the most context and the most work, to `context`, the least; by default half of `context`.
            batch_size: how many windows are scored at once.
            start_in_every_window: whether each window begins with the start token, in place of its first token, for
                models that expect it there.
            progress: is called with the number of tokens that have been scored since the last call.

        Raises:
            ValueError: arguments or tokens out of their range; a model that gives no numbers.
        """
        if not self.causal:
            raise ValueError("`score_document` needs a language model, and this one scores inputs with labels.")
        context, stride, batch_size = self._checked_windows(context, stride, batch_size)
        if start_in_every_window and self.start_token is None:
            raise ValueError(
                "`start_in_every_window` needs a start token. Export the model with `start_token`, if it was trained "
                "with one."
            )
        tokens = self._with_start(ids)
        result = np.full(len(tokens), np.nan)
        all_windows = list(windows(len(tokens), context, stride))
        for first in range(0, len(all_windows), batch_size):
            batch = all_windows[first : first + batch_size]
            token_ids = np.stack([tokens[w.begin : w.end] for w in batch])
            if start_in_every_window:
                token_ids[:, 0] = self.start_token
            mask = np.stack([np.arange(w.begin, w.end) >= w.first_scored for w in batch])
            scored = self._score_padded("score", token_ids, mask)
            for window, values, valid in zip(batch, scored["token_log_likelihood"], scored["token_mask"], strict=True):
                if np.isnan(values[valid]).any():
                    place = window.begin + 1 + int(np.flatnonzero(valid & np.isnan(values))[0])
                    raise ValueError(
                        f"The model's log-likelihood of token {place - (self.start_token is not None)} is not a "
                        "number: look for NaN in its weights."
                    )
                new = window.end - window.first_scored
                result[window.first_scored : window.end] = np.where(valid, values, np.nan)[-new:]
            if progress is not None:
                progress(sum(w.end - w.first_scored for w in batch))
        return result if self.start_token is None else result[1:]

    def _checked_windows(self, context, stride, batch_size):
        batch_size = arguments.count("batch_size", batch_size)
        given = (("context", context), ("stride", stride))
        context, stride = (value if value is None else arguments.count(name, value) for name, value in given)
        limit = self.context or self.length
        if context and limit and context > limit:
            raise ValueError(
                f"`context` must be at most {limit}, the number of tokens that the model takes. "
                f"Received: context={context}."
            )
        context = context or limit or _DEFAULT_CONTEXT
        stride = stride or max(1, context // 2)
        if stride > context:
            raise ValueError(f"`stride` must be at most `context`, {context}. Received: stride={stride}.")
        return context, stride, min(batch_size, self.batch or batch_size)

    def _with_start(self, ids):
        """The tokens of a document after the start token, if there is one."""
        ids = np.asarray(ids) if len(ids) else np.zeros(0, "int32")
        if ids.ndim != 1:
            raise ValueError(
                f"`ids` must be the tokens of one document, of shape [T]. Received: shape {ids.shape}. Score several "
                "documents one after the other."
            )
        if ids.dtype.kind not in "iu":
            raise ValueError(f"`ids` must be whole numbers. Received: dtype {ids.dtype}.")
        self._check_range(ids[None], np.ones((1, len(ids)), bool))
        ids = ids.astype("int64")
        return ids if self.start_token is None else np.insert(ids, 0, self.start_token)

    def _checked_tokens(self, token_ids, mask):
        token_ids = self._checked("token_ids", token_ids)
        mask = self._checked("mask", np.ones(token_ids.shape, bool) if mask is None else mask)
        if mask.shape != token_ids.shape:
            raise ValueError(
                f"`mask` must have the shape of `token_ids`. Received: {mask.shape} and {token_ids.shape}."
            )
        self._check_range(token_ids, mask)
        return token_ids, mask

    def _score_padded(self, signature, token_ids, mask):
        """The signature's outputs, computed with as many rows and tokens as a model of fixed size takes."""
        rows, length = token_ids.shape
        padding = _padding(self._inputs["token_ids"].shape, token_ids.shape)
        scored = self._run(signature, {"token_ids": np.pad(token_ids, padding), "mask": np.pad(mask, padding)})
        kept = (slice(rows), slice(max(0, length - 1)))
        return {name: value[kept[: value.ndim]] for name, value in scored.items()}

    def _run(self, signature, given):
        import tensorflow as tf

        tensors = {name: tf.constant(value, self._inputs[name].dtype) for name, value in given.items()}
        try:
            scored = self._signatures[signature](**tensors)
        except tf.errors.OpError as error:
            shape = next(iter(given.values())).shape
            raise ValueError(
                f"The model cannot score an input of shape {shape} ({_reason(error)}). If that is too much for it, "
                "give it less at once: a smaller `context`, a smaller batch. If it works with one length only, make it "
                "with an input of that length, such as `keras.Input([128])`, before the export."
            ) from error
        return {name: value.numpy() for name, value in scored.items()}

    def _checked(self, name, value):
        """The array, if the signature takes it, after padding where it is a language model's."""
        spec = self._inputs[name]
        try:
            array = np.asarray(value)
        except ValueError:
            raise ValueError(f"`{name}` must be rows of one length. Received: rows of uneven length.") from None
        kinds = {"i": "iu", "b": "b"}.get(spec.dtype.as_numpy_dtype().dtype.kind, "fiu")
        fits = array.dtype.kind in kinds or array.size == 0
        if self.causal:
            sizes = zip(spec.shape, array.shape, strict=False)
            fits &= array.ndim == 2 and all(size is None or given <= size for size, given in sizes)
        else:
            fits &= spec.shape.is_compatible_with(array.shape)
        if not fits:
            at_most = "at most " if self.causal else ""
            shape = ", ".join("any" if size is None else f"{at_most}{size}" for size in spec.shape)
            raise ValueError(
                f"`{name}` must have dtype {spec.dtype.name} and shape ({shape}). "
                f"Received: dtype {array.dtype} and shape {array.shape}."
            )
        return array

    def _check_range(self, token_ids, mask):
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


def _padding(sizes, shape):
    """Returns the padding at the end of each axis up to the sizes that the model takes; None stands for any size."""
    if any(size is not None and given > size for size, given in zip(sizes, shape, strict=True)):
        raise ValueError(f"The model takes token_ids of shape at most {tuple(sizes)}. Received: shape {shape}.")
    return [(0, 0 if size is None else size - given) for size, given in zip(sizes, shape, strict=True)]


def _reason(error):
    """Returns the message of a graph's error, without the part that locates it in the graph."""
    others = ("Graph execution error", "Detected at", "<stack traces", "\t")
    lines = [line for line in str(error.message).splitlines() if line.strip() and not line.startswith(others)]
    return lines[0].partition(" [[")[0].rstrip(".") if lines else type(error).__name__
