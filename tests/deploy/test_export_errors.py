"""What cannot be exported is refused with a sentence that says why."""

import keras
import pytest

from keras_xent.deploy import export_scorer
from tests.deploy.models import classifier, language_model


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (
            {"endpoints": ("serve", "loss")},
            "`endpoints` must be some of 'serve', 'score', 'rank', 'train_step', each once. "
            "Received: ('serve', 'loss').",
        ),
        (
            {"endpoints": ()},
            "`endpoints` must be some of 'serve', 'score', 'rank', 'train_step', each once. Received: ().",
        ),
        ({"compiled": 1}, "`compiled` must be True or False. Received: compiled=1."),
        (
            {"start_token": 50},
            "`start_token` must be None or a whole number of at least 0 and below 50. Received: 50.",
        ),
        ({"context": 0}, "`context` must be None or a whole number of at least 1. Received: 0."),
    ],
)
def test_arguments_out_of_their_range(arguments, sentence, tmp_path):
    with pytest.raises(ValueError) as error:
        export_scorer(language_model(), tmp_path, **arguments)
    assert str(error.value) == sentence


def test_models_that_cannot_be_exported(tmp_path):
    built = classifier()
    bare = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
    unbuilt = keras.Sequential([keras.layers.Dense(4)])
    cases = [
        (
            (built, {"causal": True}),
            "`causal` must be False for a model that does not predict a token for each of its inputs, from shape "
            "[B, T] to [B, T, V]. Received: causal=True and a model from (None, 8) to (None, 4).",
        ),
        (
            (bare, {}),
            "`model` must be compiled with one loss for the endpoints ('serve', 'score'). Received: loss=None. "
            "Compile it first, or export fewer `endpoints`.",
        ),
        (
            (built, {"endpoints": ("score", "rank")}),
            "`endpoints` may hold 'rank' for a language model only, and `model` has labels (causal=False).",
        ),
        (
            (unbuilt, {}),
            "`model` must be a built Functional or Sequential model with one input and one output. Received: "
            "Sequential. Make one around it, such as `tokens = keras.Input([None], dtype='int32'); "
            "keras.Model(tokens, model(tokens))`.",
        ),
    ]
    for (model, arguments), sentence in cases:
        with pytest.raises(ValueError) as error:
            export_scorer(model, tmp_path, **arguments)
        assert str(error.value) == sentence


def test_a_file_is_not_written_over(tmp_path):
    model = language_model()
    model.save(tmp_path / "model.keras")
    before = (tmp_path / "model.keras").read_bytes()
    with pytest.raises(
        ValueError, match="`path` must be a folder, which is made if it is missing. Received: the file '"
    ):
        export_scorer(model, tmp_path / "model.keras")
    assert (tmp_path / "model.keras").read_bytes() == before


def test_on_jax_it_says_where_to_export(tmp_path, monkeypatch):
    model = language_model()
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    with pytest.raises(ValueError) as error:
        export_scorer(model, tmp_path)
    assert str(error.value) == (
        "`export_scorer` writes the programs of Keras on TensorFlow, and Keras runs on 'jax'. Save the model with "
        "`model.save('model.keras')`, and load and export it in a process with the environment variable "
        "KERAS_BACKEND=tensorflow."
    )
