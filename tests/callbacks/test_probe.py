"""A fixed batch whose tokens are looked at."""

import html
import re

import numpy as np
import pytest
from tensorboard.plugin_util import markdown_to_safe_html

from keras_xent.callbacks._heat_map import heat_maps
from keras_xent.callbacks._probe import Loss, Probe
from tests.callbacks.training import data


def loss(nll, counts=None, labels=None):
    nll = np.array(nll, "float32")
    counts = np.ones(nll.shape, bool) if counts is None else np.array(counts, bool)
    labels = np.arange(nll.size).reshape(nll.shape) if labels is None else np.array(labels)
    return Loss(nll, counts, labels, np.zeros(nll.shape, int), uniform=3.0)


@pytest.mark.parametrize(
    "decode, text",
    [(None, "2"), (["a", "b", "c\n"], "c\u23ce"), ({2: "x"}, "x"), (lambda token: f"<{token}>", "<2>"), (["a"], "2")],
)
def test_tokens_are_read_by_functions_lists_and_dicts(decode, text):
    assert Probe(data(), decode).text(np.int64(2)) == text


def test_the_table_has_the_worst_first_and_none_that_do_not_count():
    found = loss([[0.1, 2.0, 9.0], [3.0, 0.5, 0.2]], [[1, 1, 0], [1, 1, 1]])
    table = Probe(data(), ["zero", "o|ne", "two", "<b>", "\n", "five"]).worst_tokens(found).splitlines()
    assert table[0] == "| loss (nats) | probability | context | token | prediction | sequence | position |"
    assert table[2] == "| 3.000 | 4.98e-02 |  | &#60;b&#62; | zero | 1 | 0 |"
    assert table[3] == "| 2.000 | 1.35e-01 | zero | o&#124;ne | zero | 0 | 1 |"
    assert len(table) == 2 + 5


@pytest.mark.parametrize(
    "texts, context", [(["the", "cat", "sat"], "the\u2423cat"), (["the", " cat", " sat"], "the\u2423cat")]
)
def test_words_of_a_context_are_apart(texts, context):
    table = Probe(data(), texts).worst_tokens(loss([[0.1, 0.2, 3.0]])).splitlines()
    assert table[2].split(" | ")[2] == context


@pytest.mark.parametrize("text", ["a|b", "[x](http://e)", "\r\n`*_", "<b>&amp;", " the", "\udc80\x00\u65e5"])
def test_any_text_stays_in_its_cell_and_means_nothing(text):
    probe = Probe(data(), [text])
    found = loss([[1.0]])
    page = markdown_to_safe_html(probe.worst_tokens(found))
    cells = re.findall(r"<td>(.*?)</td>", page, re.DOTALL)
    assert len(cells) == 7
    shown = text.replace("\r", "\u240d").replace("\n", "\u23ce").replace(" ", "\u2423")
    assert html.unescape(cells[3]) == shown.replace("\udc80\x00", "\ufffd\ufffd")
    assert heat_maps(found, probe.text).shape[0] == 1


def test_a_function_that_fails_is_told_once_and_numbers_are_shown():
    def decode(token):
        raise RuntimeError("no such token")

    probe = Probe(data(), decode)
    with pytest.warns(UserWarning) as warned:
        assert [probe.text(3), probe.text(4)] == ["3", "4"]
    assert [str(w.message) for w in warned] == [
        "`decode` failed for token 3, which is shown as its number: RuntimeError('no such token')."
    ]


def test_the_picture_is_darker_where_the_loss_is_larger():
    probe = Probe(data(), [" "] * 4)
    low, high = heat_maps(loss([[0.1] * 4, [2.9] * 4]), probe.text)
    assert low.shape == high.shape and low.dtype == np.uint8
    assert high.mean() < low.mean() - 10


def test_there_is_a_picture_of_each_of_a_few_sequences_up_to_its_last_token_that_counts():
    probe = Probe(data(), None)
    many = heat_maps(loss(np.ones((30, 400))), probe.text)
    assert len(many) == 8 and max(many.shape[1:]) < 1000
    counts = np.arange(40) < np.array([[3], [17]])
    padded = heat_maps(loss(np.ones((2, 40)), counts), probe.text)
    assert padded.shape == heat_maps(loss(np.ones((2, 18))), probe.text).shape
    assert padded.shape[1] < heat_maps(loss(np.ones((2, 40))), probe.text).shape[1]
    assert heat_maps(loss(np.ones((2, 3)), np.zeros((2, 3))), probe.text).shape[0] == 2


def test_losses_that_are_no_numbers_are_drawn_and_listed():
    probe = Probe(data(), None)
    found = loss([[np.nan, np.inf, 1.0]])
    assert heat_maps(found, probe.text).ndim == 4
    assert "nan" in probe.worst_tokens(found) and "inf" in probe.worst_tokens(found)
