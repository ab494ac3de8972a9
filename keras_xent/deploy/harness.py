"""Language models of Keras, and exported ones, in the LM Evaluation Harness (the package lm_eval)."""

import collections
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from keras_xent import arguments
from keras_xent.deploy._scorer import Scorer
from keras_xent.deploy._token_models import ExportedTokenModel, KerasTokenModel, padded, padded_length
from keras_xent.deploy._tokenizers import text_tokenizer
from keras_xent.deploy._windows import windows

try:
    from lm_eval.api.model import LM
except ImportError:
    # Without the package the methods take anything whose `args` are those of its requests.
    LM = object

# Where neither the request nor the model says how many: the harness's own default (of a small model half of its
# context), and that of `score_document`.
_MAX_NEW_TOKENS, _CONTEXT = 256, 512


class HarnessModel(LM):
    """A language model for `lm_eval.simple_evaluate(model=HarnessModel(model), tasks=[...])`.

    Takes a KerasHub CausalLM, any Keras model from tokens `[B, T]` to logits `[B, T, V]`, or an exported model that
    `load_scorer` has loaded. Log-likelihoods are computed without materializing the logits where the model ends in
    `LogitsDense` or `TiedLogits` (see `fuse_head`), and depend on the batch size by no more than rounding. `pip install
    'keras-xent[harness]'` installs the harness.

    The log-likelihood of a continuation `y` after a context `x` is `sum_t log p(y_t | x, y_<t)`, with tokens as the
    harness has them: `x` those of the context, of which spaces at the end belong to the continuation, and `y` the
    tokens of the whole text from the number of those on. The model is given the last `context` tokens.

    Args:
        model: the model. An exported one needs the signature `rank`, or `serve`, to say whether a continuation is the
            greedy one, and `serve` to generate: one text at a time, with its logits `[T, V]` in memory.
        tokenizer: a tokenizer of KerasHub, a `tokenizers.Tokenizer`, or the path of its JSON file. The default is the
            one of the model's preprocessor or export.
        batch_size: how many texts are computed at once.
        context: the most tokens that the model is given. The default is the limit that the model states, else 512. A
            request to generate leaves room for its new tokens, by default 256 or half of the context.
        add_start_token: whether every text begins with the start token. The default is how the model was trained: its
            preprocessor's `add_start_token`, or whether it was exported with a `start_token`.
        start_in_every_window: whether a text that is cut to the model's context begins with the start token again, in
            place of its first token, for models that expect it there.
        start_token, end_token: the tokens before and after a text; by default those of the tokenizer or the export. A
            text without a context is given the start token, or the end token if there is none.

    Raises:
        ValueError: a model whose tokenizer or input is not known, or a request that it cannot serve.

    References: https://github.com/EleutherAI/lm-evaluation-harness (docs/model_guide.md).
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        batch_size: int = 8,
        context: int | None = None,
        add_start_token: bool | None = None,
        start_in_every_window: bool = False,
        start_token: int | None = None,
        end_token: int | None = None,
    ) -> None:
        super().__init__()
        exported, preprocessor = isinstance(model, Scorer), getattr(model, "preprocessor", None)
        if tokenizer is None:
            tokenizer = model.tokenizer if exported else getattr(preprocessor, "tokenizer", None)
        if tokenizer is None:
            raise ValueError("`tokenizer` must be given for a model that has none of its own.")
        self.batch_size = arguments.count("batch_size", batch_size)
        context = context if context is None else arguments.count("context", context)
        self._encode, self._decode = text_tokenizer(tokenizer)
        self._model = ExportedTokenModel(model) if exported else KerasTokenModel(model)
        if context and self._model.limit and context > self._model.limit:
            raise ValueError(
                f"`context` must be at most {self._model.limit}, the number of tokens that the model can be given. "
                f"Received: context={context}."
            )
        self.context: int = context or self._model.context or _CONTEXT
        self.end_token = _first(end_token, getattr(tokenizer, "end_token_id", None))
        own_start = model.start_token if exported else getattr(tokenizer, "start_token_id", None)
        self.start_token = _first(start_token, own_start, self.end_token)
        if add_start_token is None:
            add_start_token = own_start is not None if exported else getattr(preprocessor, "add_start_token", False)
        self._prefix = self._start() if add_start_token else []
        self._window_start = self._start() if start_in_every_window else []

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Of each request `(context, continuation)` the log-likelihood, and whether it is the greedy continuation."""
        pairs = [self._pair(*request.args) for request in requests]
        return self._likelihoods(pairs, lambda index, result: self._keep("loglikelihood", requests[index], result))

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Of each request `(text,)` the log-likelihood of the whole text, in windows that score each token once."""
        pairs = [(self._start(), self._encode(*request.args)) for request in requests]

        def keep(index, result):
            self._keep("loglikelihood_rolling", requests[index], result[0])

        return [log_likelihood for log_likelihood, _ in self._likelihoods(pairs, keep)]

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Of each request `(context, options)` the greedy continuation, up to the first of the strings in `until`."""
        results = [""] * len(requests)
        rows = [(index, *self._prompt(*request.args)) for index, request in enumerate(requests)]
        for options in dict.fromkeys(row[2:] for row in rows):
            same = [row for row in rows if row[2:] == options]
            for batch in self._batches(same, lambda row: len(row[1])):
                texts = self._generate([prompt for _, prompt, *_ in batch], *options)
                for (index, *_), text in zip(batch, texts, strict=True):
                    results[index] = text
                    self._keep("generate_until", requests[index], text)
        return results

    def _keep(self, method, request, result):
        """Tells the harness's cache of a result, which a run that is interrupted then does not lose."""
        hook = getattr(self, "cache_hook", None)
        if hook is not None:
            hook.add_partial(method, request.args, result)

    # Tokens

    def _start(self):
        if self.start_token is None:
            raise ValueError("A text without a context needs a token before it: give `start_token` or `end_token`.")
        return [self.start_token]

    def _pair(self, context, continuation):
        """The tokens of context and continuation."""
        # Tokenizers join a space with the word after it.
        stripped = context.rstrip()
        context, continuation = stripped, context[len(stripped) :] + continuation
        if not context:
            return self._start(), self._encode(continuation)
        tokens = self._encode(context)
        return [*self._prefix, *tokens] or self._start(), self._encode(context + continuation)[len(tokens) :]

    def _prompt(self, context, options):
        """The tokens of a prompt, how many may follow, and the strings that end the text."""
        # As the harness reads them, a temperature alone asks for samples.
        if _first(options.get("do_sample"), float(options.get("temperature") or 0) > 0):
            raise ValueError(f"`do_sample` must be False: generation is greedy. Received: {options}.")
        names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
        max_new = int(_first(*(options.get(name) for name in names), min(_MAX_NEW_TOKENS, self.context // 2)))
        if not 1 <= max_new < self.context:
            raise ValueError(
                f"`max_gen_toks` must be at least 1 and below {self.context}, the number of tokens that the model is "
                f"given. Received: {max_new}."
            )
        until = options.get("until") or ()
        until = (until,) if isinstance(until, str) else tuple(filter(None, until))
        prompt = [*self._prefix, *self._encode(context)] or self._start()
        return _last(prompt, self.context - max_new, self._window_start), max_new, until

    # Computation

    def _likelihoods(self, pairs, keep):
        rows = []
        for index, (context, continuation) in enumerate(pairs):
            tokens = [*context, *continuation]
            for window in windows(len(tokens), self.context, self.context, len(context)):
                given = _last(tokens[: window.end], self.context + 1, self._window_start)
                rows.append((index, given, window.end - window.first_scored))
        values, greedy = np.zeros(len(pairs)), np.ones(len(pairs), bool)
        windows_left = collections.Counter(index for index, *_ in rows)
        # The model is not given the last token.
        for batch in self._batches(rows, lambda row: len(row[1]) - 1):
            length = 1 + self._padded_length(len(batch[0][1]) - 1)
            tokens, is_token = padded([row[1] for row in batch], length, self._padded_batch(len(batch)))
            scored = np.zeros(tokens.shape, bool)
            for i, (_, window, number) in enumerate(batch):
                scored[i, len(window) - number : len(window)] = True
            log_likelihood, is_greedy = self._model.statistics(tokens, is_token, scored)
            for i, (index, *_) in enumerate(batch):
                values[index] += log_likelihood[i][scored[i, 1:]].sum(dtype="float64")
                greedy[index] &= is_greedy[i][scored[i, 1:]].all()
                windows_left[index] -= 1
                if not windows_left[index]:
                    keep(index, (float(values[index]), bool(greedy[index])))
        return [(float(value), bool(is_greedy)) for value, is_greedy in zip(values, greedy, strict=True)]

    def _generate(self, prompts, max_new, until):
        # A string that is one token ends the text as soon as the model gives it; others are looked for in the text.
        encoded = [(string, self._encode(string)) for string in until]
        # A tokenizer that does not know the string has one token for all that it does not know.
        stop = {tokens[0] for string, tokens in encoded if len(tokens) == 1 and string in self._decode(tokens)}
        stop |= {self.end_token} - {None}
        given = [self._decode(prompt) for prompt in prompts]

        def text(index, tokens):
            whole = self._decode([*prompts[index], *tokens])
            # By itself, a word of SentencePiece loses the space before it.
            return whole[len(given[index]) :] if whole.startswith(given[index]) else self._decode(tokens)

        def done(index, tokens):
            return any(string in text(index, tokens) for string in until)

        generated = self._model.generate(prompts, max_new, stop, done)
        return [_before_any(text(index, tokens), until) for index, tokens in enumerate(generated)]

    def _batches(self, rows: list[Any], length: Callable[[Any], int]) -> Iterator[list[Any]]:
        """Rows of one padded length, which each row has by itself: its result does not depend on the others."""
        by_length = sorted(rows, key=length, reverse=True)
        for _, group in itertools.groupby(by_length, key=lambda row: self._padded_length(length(row))):
            same = list(group)
            yield from (same[i : i + self.batch_size] for i in range(0, len(same), self.batch_size))

    def _padded_length(self, length):
        return self._model.fixed_length or padded_length(length, self.context)

    def _padded_batch(self, size):
        return min(self.batch_size, 1 << (size - 1).bit_length())


def _last(tokens, number, start):
    """The last tokens, at most `number` with the start token in front of what is left of them."""
    return tokens if len(tokens) <= number else [*start, *tokens[len(tokens) - number + len(start) :]]


def _before_any(text, strings):
    return min((text.partition(string)[0] for string in strings), key=len, default=text)


def _first(*values):
    return next((value for value in values if value is not None), None)
