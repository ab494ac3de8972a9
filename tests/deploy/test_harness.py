"""The adapter of the LM Evaluation Harness: its contract, in numbers of the model's own log-probabilities."""

import json
import warnings
from types import SimpleNamespace

import keras
import numpy as np
import pytest
from tokenizers import ByteLevelBPETokenizer, Tokenizer, models

import keras_xent as kx
from keras_xent.deploy import _signatures
from keras_xent.deploy.harness import HarnessModel
from tests.backend import BACKEND, to_numpy

keras_hub = pytest.importorskip("keras_hub", reason="keras-hub is not installed: pip install '.[hub]'")
only_tensorflow = pytest.mark.skipif(BACKEND != "tensorflow", reason="models are exported by Keras on TensorFlow")

CONTEXT = 24
# Context and continuation: none, a space between them, a word in two, texts longer than the model's context.
PAIRS = [
    ("a cat sat", " on a mat"),
    ("a cat sat ", "on a mat"),
    ("", "a cat"),
    ("the c", "at"),
    # Of the whole text the first tokens are others than those of the context.
    ("s", "at on a mat"),
    ("a cat sat on a mat " * 6, "a dog"),
    ("a", " cat sat on the mat \U0001f600" * 4),
    ("a cat", ""),
]
TEXTS = ["a cat", "sat on a mat, a cat sat on a mat, a dog did not " * 3, "", "\U0001f600"]


def requests(*arguments):
    return [SimpleNamespace(args=argument) for argument in arguments]


@pytest.fixture(scope="module")
def tokenizer():
    """One for each byte, and a few merges; token 0 begins and ends a text."""
    made = ByteLevelBPETokenizer()
    made.train_from_iterator(["a cat sat on a mat"] * 3, 300, special_tokens=["<|endoftext|>"], show_progress=False)
    return made


def causal_lm(tokenizer, fused=True):
    """A GPT-2 of KerasHub with random weights, which are large enough for its tokens to differ."""
    keras.utils.set_random_seed(3)
    data = json.loads(tokenizer.to_str())["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in data["merges"]]
    of_hub = keras_hub.models.GPT2Tokenizer(vocabulary=data["vocab"], merges=merges)
    preprocessor = keras_hub.models.GPT2CausalLMPreprocessor(of_hub, sequence_length=CONTEXT)
    sizes = {"num_layers": 1, "num_heads": 2, "hidden_dim": 16, "intermediate_dim": 16, "max_sequence_length": 32}
    model = keras_hub.models.GPT2CausalLM(
        keras_hub.models.GPT2Backbone(len(data["vocab"]), dropout=0.0, **sizes), preprocessor
    )
    model.set_weights([weight * (20 if weight.ndim == 2 else 1) for weight in model.get_weights()])
    if fused:
        kx.fuse_head(model)
    return model


@pytest.fixture(scope="module")
def model(tokenizer):
    return causal_lm(tokenizer)


def log_probabilities(model, tokens):
    """In float64, from the logits of the model for these tokens and padding that it does not look at: `[T, V]`."""
    length = len(tokens)
    padded = np.pad(tokens, (0, CONTEXT - length))[None]
    given = {"token_ids": padded, "padding_mask": np.arange(CONTEXT)[None] < length}
    logits = to_numpy(model(given if isinstance(model.input, dict) else padded))[0, :length]
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def expected(model, context, continuation, start=()):
    """The continuation's log-likelihood, in windows of the context; and whether each token is the likeliest."""
    tokens, first, total, greedy = [*context, *continuation], len(context), 0.0, True
    while first < len(tokens):
        end = min(len(tokens), first + CONTEXT)
        window = tokens[max(0, end - CONTEXT - 1) : end]
        window = [*start, *window[len(start) :]] if end > CONTEXT + 1 else window
        log_p, new = log_probabilities(model, window[:-1])[first - end :], window[first - end :]
        total += log_p[np.arange(len(new)), new].sum()
        greedy &= bool((log_p.argmax(-1) == new).all())
        first = end
    return total, greedy


def tokens_of(tokenizer, context, continuation):
    """As the harness cuts them: a space between both belongs to the continuation."""
    cut = context.rstrip()
    continuation, context = context[len(cut) :] + continuation, cut
    given = tokenizer.encode(context).ids
    return [0, *given], tokenizer.encode(context + continuation).ids[len(given) :]


@pytest.mark.parametrize("batch_size", [pytest.param(1, marks=pytest.mark.whole), 16])
def test_log_likelihoods_are_those_of_the_model(model, tokenizer, batch_size):
    found = HarnessModel(model, batch_size=batch_size).loglikelihood(requests(*PAIRS))
    for pair, (value, greedy) in zip(PAIRS, found, strict=True):
        right, right_greedy = expected(model, *tokens_of(tokenizer, *pair))
        assert value == pytest.approx(right, rel=1e-6)
        assert greedy == right_greedy
    assert found[-1] == (0.0, True)


@pytest.mark.whole
def test_the_greedy_continuation_is_known(model, tokenizer):
    """The likeliest token after one of the letters, whose text is a token again, and another one."""
    for context in "abcdefghijklmnopqrstuvwxyz":
        likeliest = int(log_probabilities(model, [0, *tokenizer.encode(context).ids])[-1].argmax())
        text = tokenizer.decode([likeliest])
        if text.isascii() and len(tokenizer.encode(context + text).ids) == 2:
            break
    other = "b" if text != "b" else "c"
    found = HarnessModel(model).loglikelihood(requests((context, text), (context, other)))
    assert [greedy for _, greedy in found] == [True, False]


@pytest.mark.parametrize("batch_size", [pytest.param(1, marks=pytest.mark.whole), 16])
def test_rolling_log_likelihoods_score_each_token_once(model, tokenizer, batch_size):
    found = HarnessModel(model, batch_size=batch_size).loglikelihood_rolling(requests(*((text,) for text in TEXTS)))
    right = [expected(model, [0], tokenizer.encode(text).ids)[0] for text in TEXTS]
    assert found == pytest.approx(right, rel=1e-6)


@pytest.mark.whole
def test_each_window_may_begin_with_the_start_token(model, tokenizer):
    lm = HarnessModel(model, start_in_every_window=True)
    [found] = lm.loglikelihood_rolling(requests((TEXTS[1],)))
    right = expected(model, [0], tokenizer.encode(TEXTS[1]).ids, start=[0])[0]
    assert found == pytest.approx(right, rel=1e-6)
    [(found, _)] = lm.loglikelihood(requests(PAIRS[4]))
    assert found == pytest.approx(expected(model, *tokens_of(tokenizer, *PAIRS[4]), start=[0])[0], rel=1e-6)


@pytest.mark.whole
def test_the_batch_size_changes_nothing(model):
    values = [
        [value for value, _ in lm.loglikelihood(requests(*PAIRS))]
        + lm.loglikelihood_rolling(requests(*((t,) for t in TEXTS)))
        for lm in (HarnessModel(model, batch_size=size) for size in (1, 2, 16))
    ]
    np.testing.assert_allclose(values[1], values[0], rtol=1e-6)
    np.testing.assert_allclose(values[2], values[0], rtol=1e-6)


def test_with_a_fused_head_no_logits_are_materialized(model, monkeypatch):
    monkeypatch.setattr(_signatures, "sparse_softmax_cross_entropy", None)
    HarnessModel(model).loglikelihood(requests(PAIRS[0]))
    with pytest.raises(TypeError):
        HarnessModel(
            keras.Sequential([keras.Input([None]), keras.layers.Embedding(300, 4), keras.layers.Dense(300)]),
            model.preprocessor.tokenizer,
        ).loglikelihood(requests(PAIRS[0]))


def greedy_text(model, tokenizer, context, max_new, until=()):
    tokens, text = [0, *tokenizer.encode(context).ids][-(CONTEXT - max_new) :], ""
    begin = len(tokenizer.decode(tokens))
    for _ in range(max_new):
        token = int(log_probabilities(model, tokens)[-1].argmax())
        if token == 0:
            break
        tokens.append(token)
        text = tokenizer.decode(tokens)[begin:]
    return min((text.split(string)[0] for string in until), key=len, default=text)


@pytest.mark.whole
def test_generation_is_greedy_and_ends_at_the_strings(model, tokenizer):
    sampler, function = model.sampler, model.generate_function
    whole = greedy_text(model, tokenizer, "a cat", 8)
    # A string of two tokens that the text holds, and one that it does not.
    until = [whole[2:4], "never"]
    cases = [
        ("a cat", {"max_gen_toks": 8}),
        ("a cat", {"until": until, "max_gen_toks": 8, "do_sample": False, "temperature": 0.0}),
        ("a cat sat on a mat, a cat sat on a mat, a cat", {"until": "\n", "max_gen_toks": 8}),
        ("a", {"max_gen_toks": 8}),
    ]
    right = [
        whole,
        whole.split(until[0])[0],
        greedy_text(model, tokenizer, cases[2][0], 8, "\n"),
        greedy_text(model, tokenizer, "a", 8),
    ]
    for batch_size in (1, 4):
        assert HarnessModel(model, batch_size=batch_size).generate_until(requests(*cases)) == right
    assert (model.sampler, model.generate_function) == (sampler, function)


def plain_model(vocabulary, length=None, head=kx.layers.LogitsDense):
    keras.utils.set_random_seed(1)
    tokens = keras.Input((length,), dtype="int32")
    hidden = keras.layers.Conv1D(16, 3, padding="causal")(keras.layers.Embedding(vocabulary, 16)(tokens))
    return keras.Model(tokens, head(vocabulary, kernel_initializer="random_normal")(hidden))


@pytest.mark.whole
@pytest.mark.parametrize("length", [None, CONTEXT])
def test_any_model_from_tokens_to_logits_is_served(tokenizer, length):
    model = plain_model(tokenizer.get_vocab_size(), length)
    free = plain_model(tokenizer.get_vocab_size())
    free.set_weights(model.get_weights())
    lm = HarnessModel(model, tokenizer, context=CONTEXT, start_token=0, add_start_token=True)
    found = lm.loglikelihood(requests(*PAIRS))
    right = [expected(free, *tokens_of(tokenizer, *pair)) for pair in PAIRS]
    np.testing.assert_allclose([value for value, _ in found], [value for value, _ in right], rtol=1e-6)
    assert lm.generate_until(requests(("a cat", {"max_gen_toks": 5, "until": "\n"}))) == [
        greedy_text(free, tokenizer, "a cat", 5, "\n")
    ]


@only_tensorflow
@pytest.mark.whole
@pytest.mark.parametrize("length, endpoints", [(None, ("serve", "score", "rank")), (CONTEXT, ("serve", "score"))])
def test_an_exported_model_gives_the_same(tokenizer, tmp_path, length, endpoints):
    model = plain_model(tokenizer.get_vocab_size(), length)
    given = {"endpoints": endpoints, "tokenizer": tokenizer, "start_token": 0, "context": CONTEXT}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`model` takes exactly 24 tokens")
        kx.deploy.export_scorer(model, tmp_path, **given)
    exported = HarnessModel(kx.deploy.load_scorer(tmp_path))
    lm = HarnessModel(model, tokenizer, context=CONTEXT, start_token=0, add_start_token=True)
    for (value, greedy), (right, right_greedy) in zip(
        exported.loglikelihood(requests(*PAIRS)), lm.loglikelihood(requests(*PAIRS)), strict=True
    ):
        assert (value, greedy) == (pytest.approx(right, rel=1e-6), right_greedy)
    texts = requests(*((text,) for text in TEXTS))
    assert exported.loglikelihood_rolling(texts) == pytest.approx(lm.loglikelihood_rolling(texts), rel=1e-6)
    prompts = requests(("a cat", {"max_gen_toks": 5}), ("a", {"max_gen_toks": 3, "until": ["cat"]}))
    assert exported.generate_until(prompts) == lm.generate_until(prompts)


@pytest.mark.whole
@only_tensorflow
def test_a_token_that_an_exported_model_masks_is_refused(tokenizer, tmp_path):
    keras.utils.set_random_seed(0)
    tokens, size = keras.Input([None], dtype="int32"), tokenizer.get_vocab_size()
    model = keras.Model(tokens, kx.layers.LogitsDense(size)(keras.layers.Embedding(size, 4, mask_zero=True)(tokens)))
    kx.deploy.export_scorer(model, tmp_path, endpoints=("score", "rank"), tokenizer=tokenizer, start_token=0)
    with pytest.raises(
        ValueError, match=r"^The exported model takes token \d+ after token 0 for padding, without a log-"
    ):
        HarnessModel(kx.deploy.load_scorer(tmp_path)).loglikelihood(requests(("a", " cat"), ("", "a")))


def test_what_cannot_be_served_is_a_sentence(model, tokenizer):
    plain = plain_model(tokenizer.get_vocab_size())
    cases = [
        (lambda: HarnessModel(plain), "`tokenizer` must be given for a model that has none of its own."),
        (
            lambda: HarnessModel(plain, 3),
            "`tokenizer` must be one of KerasHub, a `tokenizers.Tokenizer`, or the path of its JSON file. "
            "Received: int.",
        ),
        (
            lambda: HarnessModel(model, batch_size=0),
            "`batch_size` must be a whole number of at least 1. Received: batch_size=0.",
        ),
        (
            lambda: HarnessModel(model, context=0),
            "`context` must be a whole number of at least 1. Received: context=0.",
        ),
        (
            lambda: HarnessModel(plain, tokenizer).loglikelihood_rolling(requests(("a",))),
            "A text without a context needs a token before it: give `start_token` or `end_token`.",
        ),
        (
            lambda: HarnessModel(model).generate_until(requests(("a", {"max_gen_toks": 24}))),
            "`max_gen_toks` must be at least 1 and below 24, the number of tokens that the model is given. "
            "Received: 24.",
        ),
        (
            lambda: HarnessModel(model).generate_until(requests(("a", {"do_sample": True}))),
            "`do_sample` must be False: generation is greedy. Received: {'do_sample': True}.",
        ),
        (
            lambda: HarnessModel("gpt2", tokenizer),
            "`model` must be a Keras model of one input, tokens [B, T], or of `token_ids` and `padding_mask` as a "
            "KerasHub CausalLM. Received: str with inputs None.",
        ),
    ]
    cases += [
        (
            # The harness takes this for samples.
            lambda: HarnessModel(model).generate_until(requests(("a", {"temperature": 0.7}))),
            "`do_sample` must be False: generation is greedy. Received: {'temperature': 0.7}.",
        ),
        (
            lambda: HarnessModel(model, context=33),
            "`context` must be at most 32, the number of tokens that the model can be given. Received: context=33.",
        ),
    ]
    for call, sentence in cases:
        with pytest.raises(ValueError) as error:
            call()
        assert str(error.value) == sentence


def test_results_are_kept_for_the_cache_of_the_harness(model):
    class Hook:
        def __init__(self):
            self.kept = []

        def add_partial(self, *result):
            self.kept.append(result)

    lm = HarnessModel(model)
    lm.cache_hook = hook = Hook()
    text = TEXTS[1]
    right = [
        ("loglikelihood", ("a", " cat"), lm.loglikelihood(requests(("a", " cat")))[0]),
        ("loglikelihood_rolling", (text,), lm.loglikelihood_rolling(requests((text,)))[0]),
    ]
    assert hook.kept == right


def test_a_string_that_the_tokenizer_does_not_know_ends_no_text():
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]"))
    model = plain_model(3)
    model.set_weights([*model.get_weights()[:-1], np.array([9.0, 0.0, 0.0])])
    lm = HarnessModel(model, words, start_token=1)
    found = lm.generate_until(requests(("a", {"until": "Question", "max_gen_toks": "2"})))
    assert found == [words.decode([1, 0, 0])[1:]]
    # Half of the context, where no number is given.
    assert HarnessModel(model, words, start_token=1, context=4).generate_until(requests(("a", {}))) == found


TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {output_type}
doc_to_text: "{{{{context}}}}"
doc_to_target: "{{{{target}}}}"
target_delimiter: ""
{options}
metric_list: [{{metric: {metric}}}]
"""


def test_the_harness_itself_reports_the_numbers_of_the_model(model, tokenizer, tmp_path):
    """One local task of each kind of request."""
    lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install '.[harness]'")
    from lm_eval.tasks import TaskManager

    data = tmp_path / "data.jsonl"
    documents = [
        {"context": "a cat", "target": " sat", "choices": [" sat", " on"]},
        {"context": "a mat", "target": " a", "choices": [" a", " b"]},
    ]
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    kinds = {
        "choice": ("multiple_choice", "doc_to_choice: choices", "acc"),
        "rolling": ("loglikelihood_rolling", "", "bits_per_byte"),
        "generated": ("generate_until", 'generation_kwargs: {until: ["\\n"], max_gen_toks: 4}', "exact_match"),
    }
    for name, (output_type, options, metric) in kinds.items():
        text = TASK.format(name=name, data=data, output_type=output_type, options=options, metric=metric)
        if name == "choice":
            text = text.replace('doc_to_target: "{{target}}"', "doc_to_target: 0")
        if name == "rolling":
            text = text.replace('doc_to_text: "{{context}}"', 'doc_to_text: ""')
        (tmp_path / f"{name}.yaml").write_text(text)
    lm = HarnessModel(model, batch_size=16)
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    results = lm_eval.simple_evaluate(lm, tasks=list(kinds), task_manager=manager, bootstrap_iters=0)
    for sample, document in zip(results["samples"]["choice"], documents, strict=True):
        pairs = [tokens_of(tokenizer, document["context"], choice) for choice in document["choices"]]
        right = [expected(model, *pair)[0] for pair in pairs]
        np.testing.assert_allclose([value for [(value, _)] in sample["resps"]], right, rtol=1e-6)
        assert sample["acc"] == float(right[0] > right[1])
    targets = [document["target"] for document in documents]
    total = sum(expected(model, [0], tokenizer.encode(text).ids)[0] for text in targets)
    bits = -total / np.log(2) / sum(len(text.encode()) for text in targets)
    assert results["results"]["rolling"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-6)
    generated = [sample["resps"][0][0] for sample in results["samples"]["generated"]]
    assert generated == [greedy_text(model, tokenizer, d["context"], 4, ["\n"]) for d in documents]
