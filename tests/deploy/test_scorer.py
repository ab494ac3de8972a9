"""Loading, the checks before TensorFlow sees anything, and documents longer than a window."""

import json
import shutil
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_xent as kx
from keras_xent.deploy import export_scorer, load_scorer
from keras_xent.deploy._windows import windows
from tests.deploy.models import classifier, language_model
from tests.tiers import whole

TOKENS = np.random.default_rng(0).integers(1, 50, 41)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scorer") / "model"
    export_scorer(language_model(), folder, endpoints=("score",))
    return folder


@pytest.fixture(scope="module")
def scorer(folder):
    return load_scorer(folder)


# Documents


@pytest.mark.parametrize("context, stride", [(1, 1), (8, 1), (8, 3), (8, 8), (40, 20), (100, 50)])
@pytest.mark.parametrize("length", [0, 1, 2, 8, 9, 10, 41])
def test_each_token_but_the_first_is_new_in_one_window(length, context, stride):
    cut = list(windows(length, context, stride))
    new = [i for window in cut for i in range(window.first_scored, window.end)]
    assert new == list(range(1, length))
    for window in cut:
        assert window.end - window.begin == min(length, context + 1)
        for i in range(window.first_scored, window.end):
            assert i - window.begin >= min(i, context - stride + 1)


@pytest.mark.parametrize("context, stride", [(8, 1), (8, 3), (64, 32)])
def test_a_document_is_scored_as_window_by_window(scorer, context, stride):
    told = []
    found = scorer.score_document(TOKENS, context=context, stride=stride, batch_size=3, progress=told.append)
    assert np.isnan(found[0])
    for window in windows(len(TOKENS), context, stride):
        alone = scorer.score(TOKENS[None, window.begin : window.end])["token_log_likelihood"][0]
        np.testing.assert_allclose(
            found[window.first_scored : window.end], alone[window.first_scored - window.end :], rtol=1e-6
        )
    assert sum(told) == len(TOKENS) - 1


def test_the_start_token_is_given_and_not_returned(tmp_path):
    model = language_model()
    export_scorer(model, tmp_path, start_token=7)
    scorer = load_scorer(tmp_path)
    found = scorer.score_document(TOKENS)
    alone = scorer.score(np.insert(TOKENS, 0, 7)[None])["token_log_likelihood"][0]
    np.testing.assert_allclose(found, alone, rtol=1e-6)
    assert scorer.score_document([5]).shape == (1,)


def test_a_token_that_the_mask_of_the_model_leaves_out_is_not_scored(scorer, tmp_path):
    """`score_document` and `score` agree: the place after a 0 has no Keras mask, at the start and in the middle."""
    export_scorer(language_model(), tmp_path, start_token=0)
    masked = load_scorer(tmp_path)
    for other, tokens, rows in ((masked, [9, 3, 4], [0, 9, 3, 4]), (scorer, [9, 3, 0, 4, 5], [9, 3, 0, 4, 5])):
        whole, found = other.score([rows]), other.score_document(tokens)[-(len(rows) - 1) :]
        valid = whole["token_mask"][0]
        assert not valid.all()
        np.testing.assert_array_equal(np.isnan(found), ~valid)
        np.testing.assert_allclose(found[valid], whole["token_log_likelihood"][0][valid], rtol=1e-6)
        np.testing.assert_allclose(np.exp(-np.nanmean(found)), whole["perplexity"][0], rtol=1e-6)


def test_ranks_are_those_of_the_signature(scorer, tmp_path):
    export_scorer(language_model(), tmp_path, endpoints=("score", "rank"))
    ranked = load_scorer(tmp_path).rank(TOKENS[None])
    score = scorer.score(TOKENS[None])
    np.testing.assert_allclose(ranked["token_log_likelihood"], score["token_log_likelihood"], rtol=1e-6)
    assert ranked["token_rank"].shape == (1, 40) and 0 <= ranked["token_rank"].min() < ranked["token_rank"].max() < 50
    with pytest.raises(ValueError) as error:
        scorer.rank(TOKENS[None])
    assert str(error.value) == (
        "The SavedModel has no signature 'rank'. Export a language model with it in `endpoints`."
    )


@whole
def test_a_start_token_in_every_window(tmp_path):
    export_scorer(language_model(), tmp_path, start_token=7)
    scorer = load_scorer(tmp_path)
    found = scorer.score_document(TOKENS, context=8, stride=3, start_in_every_window=True)
    tokens = np.insert(TOKENS, 0, 7)
    for window in windows(len(tokens), 8, 3):
        alone = scorer.score([[7, *tokens[window.begin + 1 : window.end]]])["token_log_likelihood"][0]
        new = window.end - window.first_scored
        np.testing.assert_allclose(found[window.first_scored - 1 : window.end - 1], alone[-new:], rtol=1e-6)
    assert not np.allclose(found, scorer.score_document(TOKENS, context=8, stride=3))


def test_a_start_token_in_every_window_needs_one(scorer):
    with pytest.raises(ValueError) as error:
        scorer.score_document(TOKENS, start_in_every_window=True)
    assert str(error.value) == (
        "`start_in_every_window` needs a start token. Export the model with `start_token`, if it was trained with one."
    )


@pytest.mark.parametrize("shape", [(1, 6), (2, 3), (6, 1)])
def test_only_one_document_is_scored_at_once(scorer, shape):
    with pytest.raises(ValueError) as error:
        scorer.score_document(TOKENS[:6].reshape(shape))
    assert str(error.value) == (
        f"`ids` must be the tokens of one document, of shape [T]. Received: shape {shape}. Score several documents one "
        "after the other."
    )


def test_tokens_are_whole_numbers_of_any_type(scorer):
    np.testing.assert_array_equal(scorer.score_document(TOKENS.astype("uint8")), scorer.score_document(TOKENS))
    with pytest.raises(ValueError, match="`ids` must be whole numbers. Received: dtype float64."):
        scorer.score_document([1.5, 2.0])


def fixed_length_models(tmp_path):
    """The same model for texts of any length and for five tokens each, loaded after their export."""
    keras.utils.set_random_seed(0)
    embedding, head = keras.layers.Embedding(50, 8), kx.layers.LogitsDense(50)
    loaded = []
    for name, shape in (("any", {"shape": (None,)}), ("length", {"shape": (5,)}), ("batch", {"batch_shape": (3, 5)})):
        tokens = keras.Input(**shape, dtype="int32")
        model = keras.Model(tokens, head(embedding(tokens)))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            export_scorer(model, tmp_path / name)
        assert bool([w for w in caught if "`model` takes exactly 5 tokens" in str(w.message)]) == (name != "any")
        loaded.append(load_scorer(tmp_path / name))
    return loaded


@pytest.mark.whole
def test_models_of_fixed_length_and_batch_are_given_padded_texts(tmp_path):
    free, *fixed = fixed_length_models(tmp_path)
    assert [(scorer.batch, scorer.length) for scorer in (free, *fixed)] == [(None, None), (None, 5), (3, 5)]
    for scorer in fixed:
        for rows in ([[3, 1, 4]], [[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]], np.zeros((2, 0), int)):
            expected = free.score(rows)
            for name, value in scorer.score(rows).items():
                np.testing.assert_allclose(value, expected[name], rtol=1e-6, err_msg=name)
        for length in (2, 6, 41):
            expected = free.score_document(TOKENS[:length], context=5, stride=2)
            found = scorer.score_document(TOKENS[:length], stride=2)
            np.testing.assert_allclose(found, expected, rtol=1e-6)
        with pytest.raises(ValueError) as error:
            scorer.score_document(TOKENS, context=6)
        assert (
            str(error.value)
            == "`context` must be at most 5, the number of tokens that the model takes. Received: context=6."
        )
    with pytest.raises(ValueError) as error:
        fixed[1].score(np.ones((4, 7), int))
    assert str(error.value) == (
        "`token_ids` must have dtype int32 and shape (at most 3, at most 6). Received: dtype int64 and shape (4, 7)."
    )


def test_nothing_has_no_likelihood(scorer):
    assert scorer.score_document([]).shape == (0,)
    np.testing.assert_array_equal(scorer.score_document([5]), [np.nan])
    np.testing.assert_array_equal(np.isnan(scorer.score_document([5, 0, 0])), [True, True, True])


@whole
def test_a_model_that_gives_no_numbers_says_so(tmp_path):
    model = language_model()
    model.set_weights([np.full_like(w, np.nan) if w.dtype.kind == "f" else w for w in model.get_weights()])
    export_scorer(model, tmp_path)
    assert np.isnan(load_scorer(tmp_path).score([[3, 4]])["log_likelihood"]).all()
    with pytest.raises(ValueError) as error:
        load_scorer(tmp_path).score_document([3, 4, 5])
    assert str(error.value) == ("The model's log-likelihood of token 1 is not a number: look for NaN in its weights.")


# What is given


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (
            ([[1.5, 2.0]],),
            "`token_ids` must have dtype int32 and shape (any, any). Received: dtype float64 and shape (1, 2).",
        ),
        (([1, 2],), "`token_ids` must have dtype int32 and shape (any, any). Received: dtype int64 and shape (2,)."),
        (
            ([["a", "b"]],),
            "`token_ids` must have dtype int32 and shape (any, any). Received: dtype <U1 and shape (1, 2).",
        ),
        (([[1, 2], [3]],), "`token_ids` must be rows of one length. Received: rows of uneven length."),
        (
            ([[1, 2, 3], [4, 50, 2**40]],),
            "`token_ids` must be numbers from 0 to 49, since the model knows 50 tokens. Received: 50 at position "
            "(1, 1). A tokenizer that gives it belongs to another model.",
        ),
        (
            ([[1, 2**40]],),
            "`token_ids` must be numbers from 0 to 49, since the model knows 50 tokens. Received: 1099511627776 at "
            "position (0, 1). A tokenizer that gives it belongs to another model.",
        ),
        (([[1, 2]], [[1, 2]]), "`score` of this model takes `token_ids` and `mask`."),
    ],
)
def test_inputs_that_no_signature_takes(scorer, arguments, sentence):
    with pytest.raises(ValueError) as error:
        scorer.score(*arguments)
    assert str(error.value) == sentence


def test_masks_that_do_not_fit(scorer):
    with pytest.raises(ValueError) as error:
        scorer.score([[1, 2]], mask=[[1, 0]])
    assert str(error.value) == (
        "`mask` must have dtype bool and shape (any, any). Received: dtype int64 and shape (1, 2)."
    )
    with pytest.raises(ValueError) as error:
        scorer.score([[1, 2]], mask=[[True]])
    assert str(error.value) == "`mask` must have the shape of `token_ids`. Received: (1, 1) and (1, 2)."


@pytest.mark.parametrize("value", [0, -1, 2.5, True])
@pytest.mark.parametrize("name", ["context", "stride", "batch_size"])
def test_windows_that_cannot_be(scorer, name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be a whole number of at least 1. Received: {name}={value}."):
        scorer.score_document(TOKENS, **{name: value})


def test_a_stride_above_the_context_is_refused(scorer):
    with pytest.raises(ValueError, match="`stride` must be at most `context`, 4. Received: stride=5."):
        scorer.score_document(TOKENS, context=4, stride=5)


def test_a_context_above_that_of_the_export_is_refused(tmp_path):
    """XLA and accelerators would take the last position's embedding for every later one."""
    export_scorer(language_model(), tmp_path, context=6)
    with pytest.raises(ValueError, match="`context` must be at most 6, the number of tokens that the model takes."):
        load_scorer(tmp_path).score_document(TOKENS, context=7)


def test_a_model_with_labels_scores_no_document(tmp_path):
    export_scorer(classifier(), tmp_path)
    scorer = load_scorer(tmp_path)
    with pytest.raises(ValueError) as error:
        scorer.score_document([1, 2])
    assert str(error.value) == "`score_document` needs a language model, and this one scores inputs with labels."
    with pytest.raises(ValueError) as error:
        scorer.score(np.zeros((2, 8)), [0.5, 1.0])
    assert str(error.value) == (
        "`labels` must have dtype int32 and shape (any). Received: dtype float64 and shape (2,)."
    )
    with pytest.raises(ValueError) as error:
        scorer.score(np.zeros((2, 8), "float32"), [0, 4])
    assert "must be classes from 0 to the number of classes less 1" in str(error.value)


# What is loaded


def test_folders_that_hold_no_scorer(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "corrupt").mkdir()
    (tmp_path / "corrupt" / "saved_model.pb").write_bytes(b"\x00no protocol buffer\xff")
    shutil.copytree(folder, tmp_path / "cut")
    data = next((tmp_path / "cut" / "variables").glob("*.data*"))
    data.write_bytes(data.read_bytes()[:100])
    foreign = tf.Module()
    foreign.f = tf.function(lambda x: x, input_signature=[tf.TensorSpec([])])
    tf.saved_model.save(foreign, tmp_path / "foreign", signatures={"serve": foreign.f})
    tf.saved_model.save(foreign, tmp_path / "other", signatures={"score": foreign.f})
    foreign.old = tf.function(
        lambda token_ids, mask: {"token_log_likelihood": tf.cast(mask, "float32")},
        input_signature=[tf.TensorSpec([None, None], "int32"), tf.TensorSpec([None, None], "bool")],
    )
    tf.saved_model.save(foreign, tmp_path / "old", signatures={"score": foreign.old})
    written = "`path` must be a folder that `export_scorer` has written. Received: "
    cases = {
        "absent": written + "'{}', which is no folder with a saved_model.pb.",
        "empty": written + "'{}', which is no folder with a saved_model.pb.",
        "m.keras": written + "'{}', a file of Keras: load it with `keras.models.load_model`, and export the model.",
        "foreign": "The SavedModel '{}' has no signature 'score'. Received: 'serve'. Write it with "
        "`keras_xent.deploy.export_scorer`, 'score' among its `endpoints`.",
        "old": "The signature 'score' of the SavedModel '{}' does not tell which tokens it has scored (`token_mask`). "
        "Export the model again.",
        "other": "The signature 'score' of the SavedModel '{}' takes ['x'], and that of `export_scorer` takes "
        "token_ids and mask, or inputs and labels. Export the model with it.",
    }
    for name, sentence in cases.items():
        with pytest.raises(ValueError) as error:
            load_scorer(tmp_path / name)
        assert str(error.value) == sentence.format(tmp_path / name)
    for name in ("corrupt", "cut"):
        with pytest.raises(ValueError) as error:
            load_scorer(tmp_path / name)
        assert str(error.value).startswith(f"TensorFlow cannot load the SavedModel '{tmp_path / name}' (")
        assert str(error.value).endswith("). Export the model again.")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"context": "9"}', "\x00"])
def test_what_lies_beside_the_model_may_not_be_anything(folder, tmp_path, text):
    shutil.copytree(folder, tmp_path / "model")
    about = tmp_path / "model" / "assets.extra" / "scorer.json"
    known = json.loads(about.read_text())
    about.write_text(json.dumps({**known, "context": "9"}) if "context" in text else text)
    with pytest.raises(ValueError) as error:
        load_scorer(tmp_path / "model")
    assert str(error.value) == f"'{about}' is not what `export_scorer` writes. Export the model again."


@whole
def test_a_scorer_without_what_lies_beside_it_still_scores(folder, scorer, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / "assets.extra")
    bare = load_scorer(tmp_path / "model")
    assert (bare.num_classes, bare.context, bare.tokenizer) == (None, None, None)
    np.testing.assert_array_equal(bare.score_document(TOKENS), scorer.score_document(TOKENS))
    with pytest.raises(ValueError, match=r"^The model cannot score an input of shape \(1, 2\) \(assertion failed: "):
        bare.score([[1, 50]])
