"""Language models as functions of padded tokens: log-likelihoods, and the next token of the greedy text."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_xent import provenance
from keras_xent.deploy._scorer import Scorer
from keras_xent.deploy._signatures import token_statistics

# Whether a text, given by its number and its new tokens, is complete.
Done = Callable[[int, list[int]], bool]


def padded(rows: list[list[int]], length: int, batch: int | None = None, pad: int = 0) -> tuple[Any, Any]:
    """Tokens `[B, length]` with `pad` after each row, and whether each is one of the row."""
    shape = (batch or len(rows), length)
    tokens, is_token = np.full(shape, pad, "int32"), np.zeros(shape, bool)
    for i, row in enumerate(rows):
        tokens[i, : len(row)], is_token[i, : len(row)] = row, True
    return tokens, is_token


def padded_length(length: int, most: int) -> int:
    """The next power of two, so that few programs are compiled."""
    return min(max(16, 1 << (length - 1).bit_length()), max(length, most))


class KerasTokenModel:
    """A model of Keras that ends in logits or probabilities `[B, T, V]`, such as a KerasHub CausalLM."""

    def __init__(self, model: Any) -> None:
        inputs = getattr(model, "input", None)
        names = set(inputs) if isinstance(inputs, dict) else set()
        if not isinstance(model, keras.Model) or isinstance(inputs, list) or names - {"token_ids", "padding_mask"}:
            raise ValueError(
                "`model` must be a Keras model of one input, tokens [B, T], or of `token_ids` and `padding_mask` as a "
                f"KerasHub CausalLM. Received: {type(model).__name__} with inputs {sorted(names) or inputs}."
            )
        self._model = model
        self._statistics, self._next_token = TokenStatistics(model, names), NextToken(model, names)
        shape = getattr(model.inputs[0], "shape", (None, None))
        backbone, preprocessor = getattr(model, "backbone", None), getattr(model, "preprocessor", None)
        # Compiled once, with the sampler that it was made with.
        self._greedy_function: Any = None
        self.fixed_length: int | None = shape[1]
        # The most tokens that it can be given, and that it was made for.
        self.limit = _least(self.fixed_length, getattr(backbone, "max_sequence_length", None))
        self.context = _least(self.limit, getattr(preprocessor, "sequence_length", None))

    def statistics(self, tokens: np.ndarray, is_token: np.ndarray, scored: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of each token of `[B, T]` but the first, the log-likelihood and whether it is the most likely one."""
        given = {"token_ids": tokens, "padding_mask": is_token, "scored": scored}
        log_likelihood, is_greedy = self._statistics.predict_on_batch(given)
        return np.asarray(log_likelihood), np.asarray(is_greedy)

    def generate(self, prompts: list[list[int]], max_new: int, stop: set[int], done: Done) -> list[list[int]]:
        """The tokens that follow each prompt, each the most likely one, up to one of `stop`."""
        if hasattr(self._model, "generate_step") and hasattr(self._model, "sampler"):
            return self._generate_with_cache(prompts, max_new, stop)
        return _step_by_step(self, prompts, max_new, stop, done)

    def next_tokens(self, tokens: np.ndarray, is_token: np.ndarray) -> np.ndarray:
        """The most likely token after each text."""
        given = {"token_ids": tokens, "padding_mask": is_token}
        return np.asarray(self._next_token.predict_on_batch(given))

    def _generate_with_cache(self, prompts, max_new, stop):
        """By the model of KerasHub itself, with its cache of keys and values."""
        from keras_hub.samplers import GreedySampler

        longest = max(map(len, prompts))
        length = padded_length(longest + max_new, self.context or 2 * (longest + max_new))
        # KerasHub takes a stop token in the padding for the end of the text.
        pad = next(token for token in range(len(stop) + 1) if token not in stop)
        tokens, is_token = padded(prompts, length, pad=pad)
        sampler, function = self._model.sampler, self._model.generate_function
        try:
            self._model.sampler, self._model.generate_function = GreedySampler(), self._greedy_function
            self._greedy_function = self._model.make_generate_function()
            given = {"token_ids": ops.convert_to_tensor(tokens), "padding_mask": ops.convert_to_tensor(is_token)}
            generated = self._greedy_function(given, stop_token_ids=tuple(sorted(stop)) or None)
        finally:
            self._model.sampler, self._model.generate_function = sampler, function
        rows = ops.convert_to_numpy(generated["token_ids"])
        new = [row[len(prompt) : len(prompt) + max_new].tolist() for row, prompt in zip(rows, prompts, strict=True)]
        return [_before(tokens, stop) for tokens in new]


class ExportedTokenModel:
    """An exported language model."""

    def __init__(self, scorer: Scorer) -> None:
        if not scorer.causal:
            raise ValueError("`model` must be a language model, and this one scores inputs with labels.")
        self._scorer = scorer
        self.fixed_length = scorer.length
        self.limit = self.context = scorer.context or scorer.length

    def statistics(self, tokens: np.ndarray, is_token: np.ndarray, scored: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of each token of `[B, T]` but the first, the log-likelihood and whether it is the most likely one."""
        if self._scorer.has("rank"):
            results = self._scorer.rank(tokens, mask=scored)
            is_greedy = results["token_rank"] == 0
        else:
            results = self._scorer.score(tokens, mask=scored)
            greedy = [self._scorer.serve(row[None, :-1])[0].argmax(-1) for row in tokens]
            is_greedy = np.stack(greedy) == tokens[:, 1:]
        unscored = scored[:, 1:] & ~results["token_mask"]
        if unscored.any():
            place = tuple(np.argwhere(unscored)[0])
            raise ValueError(
                f"The exported model takes token {tokens[:, 1:][place]} after token {tokens[:, :-1][place]} for "
                "padding, without a log-likelihood. Give the tokenizer and the start token that it was trained with."
            )
        return results["token_log_likelihood"], is_greedy

    def generate(self, prompts: list[list[int]], max_new: int, stop: set[int], done: Done) -> list[list[int]]:
        """The tokens that follow each prompt, each the most likely one, up to one of `stop`."""
        return _step_by_step(self, prompts, max_new, stop, done)

    def next_tokens(self, tokens: np.ndarray, is_token: np.ndarray) -> np.ndarray:
        """The most likely token after each text."""
        # One text at a time: the signature returns the logits of every token.
        lengths = is_token.sum(1)
        rows = zip(tokens, lengths, strict=True)
        return np.array([self._scorer.serve(row[None])[0, length - 1].argmax() for row, length in rows])


def _step_by_step(model, prompts, max_new, stop, done):
    """One token at a time, each time from the whole text."""
    new: list[list[int]] = [[] for _ in prompts]
    growing = list(range(len(prompts)))
    for _ in range(max_new):
        texts = [[*prompts[i], *new[i]] for i in growing]
        longest = max(map(len, texts))
        length = model.fixed_length or padded_length(longest, model.context or 2 * longest)
        following = model.next_tokens(*padded(texts, length))
        for i, token in zip(growing, following, strict=True):
            new[i].append(int(token))
        growing = [i for i in growing if new[i][-1] not in stop and not done(i, new[i])]
        if not growing:
            break
    return [_before(tokens, stop) for tokens in new]


def _least(*numbers: int | None) -> int | None:
    return min((number for number in numbers if number is not None), default=None)


def _before(tokens, stop):
    return tokens[: next((i for i, token in enumerate(tokens) if token in stop), len(tokens))]


class FunctionOfOutput(keras.Model):
    """A function of a language model's output, which Keras compiles on either backend without the model's state."""

    def __init__(self, model: Any, names: set[str]) -> None:
        super().__init__()
        self.language_model, self._names = model, names
        # It has no weights of its own.
        self.built = True

    def _predictions(self, inputs):
        given = {name: inputs[name] for name in self._names} if self._names else inputs["token_ids"]
        return self.language_model(given, training=False)


class TokenStatistics(FunctionOfOutput):
    """Log-likelihoods of tokens, and whether each is the most likely one."""

    def call(self, inputs: Any) -> Any:
        """Of a dict of tokens `[B, T]`."""
        labels, scored = inputs["token_ids"][:, 1:], inputs["scored"][:, 1:]
        predictions = self._predictions({name: value[:, :-1] for name, value in inputs.items()})
        nll, rank = token_statistics(labels, predictions, scored, self.language_model.loss, ranks=True)
        return -nll, ops.equal(rank, 0)


class NextToken(FunctionOfOutput):
    """The most likely token after each text."""

    def call(self, inputs: Any) -> Any:
        """Of a dict of tokens `[B, T]`."""
        predictions = self._predictions(inputs)
        last = ops.sum(ops.cast(inputs["padding_mask"], "int32"), axis=1)[:, None, None] - 1  # [B, 1, 1]
        _, logits = provenance.activation_and_logits(predictions)
        head = provenance.head_of(predictions if logits is None else logits)
        if head is None:
            return ops.argmax(ops.take_along_axis(predictions, last, axis=1)[:, 0], axis=-1)
        # Only the logits of the last token [B, V], from its hidden state [B, D].
        hidden = ops.take_along_axis(head.hidden, last, axis=1)[:, 0]
        return ops.argmax(head.logits_of(hidden), axis=-1)
