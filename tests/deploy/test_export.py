"""What is exported gives, in a process without Keras and this package, what the model gives here."""

import json

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2

import keras_xent as kx
from keras_xent.deploy import export_scorer, load_scorer
from tests.deploy.models import VOCABULARY, classifier, in_plain_tensorflow, language_model, sequences
from tests.tiers import fast_for, whole

ALL = ("serve", "score", "train_step")
OF_TOKENS = (*ALL, "rank")
# Of batch 1 and 64, and of lengths that the model has never seen.
SHAPES = [(1, 9), (64, 9), (6, 23), (5, 1), (2, 0), (0, 9)]
STEPS = 5


def step(i):
    tokens = sequences(8, 10, seed=i)
    weights = np.random.default_rng(i).uniform(0, 2, (8, 9)).astype("float32")
    return tokens[:, :-1], tokens[:, 1:], weights


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A trained model, and the results of everything that its two exports were asked for."""
    folder = tmp_path_factory.mktemp("exported")
    model = language_model()
    model.fit(*step(99)[:2], verbose=0)
    calls = {}
    for name, compiled in (("operations", False), ("xla", True)):
        export_scorer(model, folder / name, endpoints=OF_TOKENS, compiled=compiled)
        for shape in SHAPES:
            tokens = sequences(*shape)
            for signature in ("score", "rank"):
                calls[name, signature, shape] = {"token_ids": tokens, "mask": tokens != 3}
        calls[name, "serve", 0] = {"token_ids": sequences(4, 9)}
        for i in range(STEPS):
            x, y, weights = step(i)
            calls[name, "train_step", i] = {"token_ids": x, "targets": y, "sample_weight": weights}
    scored = {shape: evaluated(model, sequences(*shape)) for shape in SHAPES}
    served = model.predict(sequences(4, 9), verbose=0)
    results = in_plain_tensorflow(calls, folder)
    return folder, model, results, scored, served


def evaluated(model, tokens):
    """Log-likelihood of each token and whether it counts, in NumPy, and the perplexity of `evaluate`."""
    x, y = tokens[:, :-1], tokens[:, 1:]
    # Keras' mask hides the place after a padding too, but no token is there.
    counts = (y != 0) & (x != 0) & (y != 3)
    if not x.size:
        return np.zeros(x.shape), counts, np.nan
    logits = model.predict(x, verbose=0).astype("float64")
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    likelihood = np.where(counts, np.take_along_axis(log_p, y[..., None], -1)[..., 0], 0.0)
    # `ignore_class` of the metric stands for the mask.
    marked = np.where(counts, y, 0)
    return likelihood, counts, model.evaluate(x, marked, verbose=0, return_dict=True)["perplexity"]


@whole
@pytest.mark.parametrize("name", ["operations", "xla"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_scores_are_those_of_evaluate(exported, name, shape):
    _, _, results, scored, _ = exported
    likelihood, counts, perplexity = scored[shape]
    result = results[name, "score", str(shape)]
    np.testing.assert_allclose(result["token_log_likelihood"], likelihood, rtol=1e-6)
    np.testing.assert_allclose(result["log_likelihood"], likelihood.sum(-1), rtol=1e-6)
    np.testing.assert_array_equal(result["num_tokens"], counts.sum(-1))
    total = result["log_likelihood"].sum() / result["num_tokens"].sum() if counts.any() else np.nan
    np.testing.assert_allclose(np.exp(-total), perplexity, rtol=1e-6)


@whole
@pytest.mark.parametrize("name", ["operations", "xla"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_scores_say_which_tokens_are_valid_and_how_many_are_more_likely(exported, name, shape):
    _, model, results, scored, _ = exported
    result, valid, score = results[name, "rank", str(shape)], scored[shape][1], results[name, "score", str(shape)]
    np.testing.assert_array_equal(result["token_mask"], valid)
    np.testing.assert_array_equal(score["token_mask"], valid)
    np.testing.assert_allclose(result["token_log_likelihood"], score["token_log_likelihood"], rtol=1e-6)
    tokens = sequences(*shape)
    if not tokens[:, 1:].size:
        return
    logits = model.predict(tokens[:, :-1], verbose=0)
    of_label = np.take_along_axis(logits, tokens[:, 1:, None], -1)
    np.testing.assert_array_equal(result["token_rank"], np.where(valid, (logits > of_label).sum(-1), 0))


@whole
@pytest.mark.parametrize("name", ["operations", "xla"])
def test_the_perplexity_of_nothing_is_nan(exported, name):
    for shape in [(64, 9), (5, 1)]:
        result = exported[2][name, "score", str(shape)]
        nothing = result["num_tokens"] == 0
        assert nothing.any()
        np.testing.assert_array_equal(np.isnan(result["perplexity"]), nothing)
        mean = result["log_likelihood"][~nothing] / result["num_tokens"][~nothing]
        np.testing.assert_allclose(result["perplexity"][~nothing], np.exp(-mean), rtol=1e-6)


@whole
@pytest.mark.parametrize("name", ["operations", "xla"])
def test_serve_gives_the_logits_of_the_model(exported, name):
    np.testing.assert_allclose(exported[2][name, "serve", "0"]["logits"], exported[4], rtol=1e-6)


@whole
def test_train_step_follows_fit(exported):
    _, model, results, _, _ = exported
    for i in range(STEPS):
        x, y, weights = step(i)
        # Dropout goes by the place of a row.
        loss = model.fit(x, y, sample_weight=weights, shuffle=False, verbose=0).history["loss"][0]
        for name in ("operations", "xla"):
            np.testing.assert_allclose(results[name, "train_step", str(i)]["loss"], loss, rtol=1e-6)


def functions_of(folder):
    """The functions of a SavedModel's graph."""
    saved = saved_model_pb2.SavedModel.FromString((folder / "saved_model.pb").read_bytes())
    return saved.meta_graphs[0].graph_def.library.function


@whole
def test_only_a_compiled_export_asks_for_xla(exported):
    folder = exported[0]
    for name, asks in (("operations", False), ("xla", True)):
        functions = functions_of(folder / name)
        compiled = [f for f in functions if f.attr["_XlaMustCompile"].b]
        operations = {node.op for f in functions for node in f.node_def if node.op.startswith("Xla")}
        assert (bool(compiled), bool(operations)) == (asks, asks)


def read_by(function):
    """The operations of a function of a graph whose results somebody reads, by name."""
    nodes, found = {node.name: node for node in function.node_def}, {}
    waiting = [*function.ret.values(), *function.control_ret.values()]
    while waiting:
        name = waiting.pop().lstrip("^").split(":")[0]
        if name in nodes and name not in found:
            found[name] = nodes[name].op
            waiting.extend(nodes[name].input)
    return found


@fast_for("LogitsDense-*")
@pytest.mark.parametrize("head, reads", [(kx.layers.LogitsDense, False), (keras.layers.Dense, True)])
def test_only_a_head_without_a_source_makes_the_logits(head, reads, tmp_path):
    model = language_model(head)
    export_scorer(model, tmp_path, endpoints=("score",))
    name = model.layers[-1].name
    scores = [f for f in functions_of(tmp_path) if f.signature.name.startswith("__inference_score")]
    made = [n for n, op in read_by(scores[0]).items() if f"/{name}_1/" in n and op in ("MatMul", "BatchMatMulV2")]
    assert bool(made) == reads


@whole
def test_a_softmax_at_the_end_is_seen_through(tmp_path):
    tokens = sequences(6, 9)
    by_activation = []
    for activation in (None, "softmax"):
        model = language_model(activation=activation)
        export_scorer(model, tmp_path)
        by_activation.append(load_scorer(tmp_path).score(tokens)["log_likelihood"])
        name = "logits" if activation is None else "probabilities"
        assert list(tf.saved_model.load(str(tmp_path)).signatures["serve"].structured_outputs) == [name]
    np.testing.assert_allclose(*by_activation, rtol=1e-6)


def test_the_soft_cap_of_the_loss_is_part_of_the_model(tmp_path):
    model, tokens = language_model(logit_softcap=0.05), sequences(4, 9)
    export_scorer(model, tmp_path)
    x, y = tokens[:, :-1], tokens[:, 1:]
    logits = 0.05 * np.tanh(model.predict(x, verbose=0).astype("float64") / 0.05)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = np.where((y != 0) & (x != 0), np.take_along_axis(log_p, y[..., None], -1)[..., 0], 0.0)
    np.testing.assert_allclose(load_scorer(tmp_path).score(tokens)["log_likelihood"], expected.sum(-1), rtol=1e-6)


def test_padding_that_is_no_token_never_reaches_the_model(tmp_path):
    model = keras.Sequential([keras.Input([None]), keras.layers.Embedding(9, 4), keras.layers.Dense(9)])
    export_scorer(model, tmp_path, ignore_class=-1)
    scorer = load_scorer(tmp_path)
    short, padded = scorer.score([[3, 1, 4]]), scorer.score([[3, 1, 4, -1, -1]])
    np.testing.assert_array_equal(padded["num_tokens"], [2])
    np.testing.assert_allclose(padded["log_likelihood"], short["log_likelihood"], rtol=1e-6)
    masked = scorer.score([[3, 1, 4, 99]], mask=[[True, True, True, False]])
    np.testing.assert_allclose(masked["log_likelihood"], short["log_likelihood"], rtol=1e-6)


@whole
def test_the_mask_may_be_left_out_in_tensorflow(exported):
    loaded = tf.saved_model.load(str(exported[0] / "operations"))
    tokens = tf.constant(sequences(6, 9))
    every = loaded.score(tokens, tf.ones_like(tokens, dtype=tf.bool))
    np.testing.assert_array_equal(loaded.score(tokens)["log_likelihood"], every["log_likelihood"])


@whole
@pytest.mark.parametrize("name", ["operations", "xla"])
def test_a_token_out_of_range_stops_the_plain_signature(exported, name):
    loaded = tf.saved_model.load(str(exported[0] / name))
    with pytest.raises(tf.errors.InvalidArgumentError, match="`token_ids` must be numbers from 0 to 49, for which the"):
        loaded.score(tf.constant([[1, 2, VOCABULARY]]))


# LiteRT


@whole
@pytest.mark.whole
@pytest.mark.parametrize("name", ["operations", "xla"])
@pytest.mark.filterwarnings("ignore:.*tf.lite.Interpreter is deprecated:UserWarning")
def test_litert_gives_the_same_numbers(exported, name):
    folder, _, results, _, _ = exported
    converter = tf.lite.TFLiteConverter.from_saved_model(str(folder / name), signature_keys=["score"])
    runner = tf.lite.Interpreter(model_content=converter.convert()).get_signature_runner("score")
    for shape in [(1, 9), (64, 9), (6, 23)]:
        tokens = sequences(*shape)
        result = runner(token_ids=tokens, mask=tokens != 3)
        for output, expected in results[name, "score", str(shape)].items():
            np.testing.assert_allclose(result[output], expected, rtol=2e-6, err_msg=output)


# Models with labels


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.whole)])
def test_a_classifier_is_scored_with_its_own_loss(compiled, tmp_path):
    model = classifier()
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((10, 8)).astype("float32"), rng.integers(0, 4, 10).astype("int32")
    p = model.predict(x, verbose=0).astype("float64")
    each = -0.9 * np.log(p[np.arange(10), y]) - 0.1 * np.log(p).mean(-1)
    loss = model.evaluate(x, y, verbose=0)
    export_scorer(model, tmp_path, endpoints=ALL, compiled=compiled)
    scored = load_scorer(tmp_path).score(x, y)
    np.testing.assert_allclose(scored["per_example_loss"], each, rtol=1e-6)
    np.testing.assert_allclose(scored["loss"], loss, rtol=1e-6)
    history = model.fit(x, y, epochs=STEPS, batch_size=10, verbose=0).history["loss"]
    train = tf.saved_model.load(str(tmp_path)).signatures["train_step"]
    steps = [train(inputs=x, labels=y, sample_weight=np.ones(10, "float32"))["loss"] for _ in range(STEPS)]
    np.testing.assert_allclose(steps, history, rtol=1e-6)


@pytest.mark.whole
@pytest.mark.parametrize(
    "loss, labels",
    [
        (kx.losses.BinaryCrossentropy(from_logits=True, ignore_class=-1), [[1, 0, -1], [0, 1, 1]]),
        (kx.losses.CategoricalCrossentropy(from_logits=True), [[1, 0, 0], [0, 0.5, 0.5]]),
        (keras.losses.SparseCategoricalCrossentropy(from_logits=True), [0, 2]),
        ("mean_squared_error", [[1, 0, 0], [0, 1, 0]]),
    ],
    ids=["binary", "categorical", "Keras' own", "a name"],
)
def test_any_loss_that_keras_knows_scores(loss, labels, tmp_path):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(3)])
    model.compile(loss=loss)
    x, y = np.random.default_rng(0).standard_normal((2, 5)).astype("float32"), np.array(labels)
    export_scorer(model, tmp_path)
    scored = load_scorer(tmp_path).score(x, y)
    np.testing.assert_allclose(scored["loss"], model.evaluate(x, y, verbose=0), rtol=1e-6)
    np.testing.assert_allclose(scored["per_example_loss"].mean(), scored["loss"], rtol=1e-6)


@pytest.mark.whole
def test_a_tagger_is_told_by_causal(tmp_path):
    model, tokens = language_model(rate=0.0), sequences(4, 9)
    export_scorer(model, tmp_path, causal=False)
    loss = load_scorer(tmp_path).score(tokens, tokens)["loss"]
    np.testing.assert_allclose(loss, model.evaluate(tokens, tokens, verbose=0, return_dict=True)["loss"], rtol=1e-6)


# What lies beside the model


@pytest.mark.whole
def test_what_lay_beside_an_earlier_model_does_not_stay(tmp_path):
    model = language_model()
    tokenizer = tmp_path / "vocabulary.json"
    tokenizer.write_text("{}")
    export_scorer(model, tmp_path / "model", tokenizer=tokenizer, start_token=1, context=7)
    scorer = load_scorer(tmp_path / "model")
    assert scorer.tokenizer.read_text() == "{}"
    assert (scorer.start_token, scorer.context, scorer.num_classes, scorer.ignore_class) == (1, 7, VOCABULARY, 0)
    export_scorer(model, tmp_path / "model")
    scorer = load_scorer(tmp_path / "model")
    assert (scorer.tokenizer, scorer.start_token, scorer.context) == (None, None, None)
    assert json.loads((tmp_path / "model/assets.extra/scorer.json").read_text())["causal"] is True


@pytest.mark.whole
def test_a_tokenizer_may_be_that_of_the_export_which_is_written_over(tmp_path):
    tokenizer = tmp_path / "vocabulary.json"
    tokenizer.write_text("{}")
    export_scorer(language_model(), tmp_path / "model", tokenizer=tokenizer)
    beside = load_scorer(tmp_path / "model").tokenizer
    export_scorer(language_model(), tmp_path / "model", tokenizer=beside)
    assert beside.read_text() == "{}"


def test_a_model_of_fixed_length_is_exported_with_a_warning(tmp_path):
    tokens = keras.Input((5,), dtype="int32")
    model = keras.Model(tokens, kx.layers.LogitsDense(9)(keras.layers.Embedding(9, 4)(tokens)))
    with pytest.warns(UserWarning) as caught:
        export_scorer(model, tmp_path, endpoints=("serve", "score"))
    [warning] = [w for w in caught if "exactly" in str(w.message)]
    assert warning.filename == __file__
    assert str(warning.message) == (
        "`model` takes exactly 5 tokens, and so does what is exported: `score` takes token_ids of shape [B, 6]. "
        "`load_scorer` pads shorter texts to that; other callers have to, with `mask` False. For texts of any length "
        "make the model with `keras.Input([None])`."
    )
    loaded = tf.saved_model.load(str(tmp_path))
    for name, length in (("serve", 5), ("score", 6)):
        spec = loaded.signatures[name].structured_input_signature[1]["token_ids"]
        assert spec.shape.as_list() == [None, length]
    # The default of the mask is "all".
    np.testing.assert_array_equal(loaded.score(np.ones((2, 6), "int32"))["num_tokens"], [5, 5])
    with pytest.raises(ValueError) as error:
        export_scorer(model, tmp_path, context=6)
    assert str(error.value) == "`context` must be None or a whole number of at least 1 and below 6. Received: 6."
