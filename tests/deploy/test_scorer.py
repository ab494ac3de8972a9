"""Loading, the checks before TensorFlow sees anything, and documents longer than a window."""

import json
import shutil

import numpy as np
import pytest
import tensorflow as tf

from keras_xent.deploy import export_scorer, load_scorer
from keras_xent.deploy._windows import windows
from tests.deploy.models import classifier, language_model

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
            found[window.first_scored : window.end], alone[window.first_scored - window.end :], rtol=1e-5
        )
    assert sum(told) == len(TOKENS) - 1


def test_the_start_token_is_given_and_not_returned(tmp_path):
    model = language_model()
    export_scorer(model, tmp_path, start_token=7)
    scorer = load_scorer(tmp_path)
    found = scorer.score_document(TOKENS)
    alone = scorer.score(np.insert(TOKENS, 0, 7)[None])["token_log_likelihood"][0]
    np.testing.assert_allclose(found, alone, rtol=1e-5)
    assert scorer.score_document([5]).shape == (1,)


def test_nothing_has_no_likelihood(scorer):
    assert scorer.score_document([]).shape == (0,)
    np.testing.assert_array_equal(scorer.score_document([5]), [np.nan])
    np.testing.assert_array_equal(np.isnan(scorer.score_document([5, 0, 0])), [True, True, True])


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


@pytest.mark.parametrize("arguments", [{"context": 4, "stride": 5}, {"batch_size": 0}, {"context": -1}, {"stride": -1}])
def test_windows_that_cannot_be(scorer, arguments):
    with pytest.raises(ValueError, match="`context`, `stride` and `batch_size` must be at least 1, and `stride` at"):
        scorer.score_document(TOKENS, **arguments)


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
    written = "`path` must be a folder that `export_scorer` has written. Received: "
    cases = {
        "absent": written + "'{}', which is no folder with a saved_model.pb.",
        "empty": written + "'{}', which is no folder with a saved_model.pb.",
        "m.keras": written + "'{}', a file of Keras: load it with `keras.models.load_model`, and export the model.",
        "foreign": "The SavedModel '{}' has no signature 'score'. Received: 'serve'. Write it with "
        "`keras_xent.deploy.export_scorer`, 'score' among its `endpoints`.",
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


def test_a_scorer_without_what_lies_beside_it_still_scores(folder, scorer, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / "assets.extra")
    bare = load_scorer(tmp_path / "model")
    assert (bare.num_classes, bare.context, bare.tokenizer) == (None, None, None)
    np.testing.assert_array_equal(bare.score_document(TOKENS), scorer.score_document(TOKENS))
    with pytest.raises(ValueError, match=r"^The model cannot score an input of shape \(1, 2\) \(assertion failed: "):
        bare.score([[1, 50]])
