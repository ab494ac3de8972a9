"""`python -m keras_xent.deploy score`: what it says of files, good and bad, and the page it makes."""

import html.parser
import json
import subprocess
import sys

import numpy as np
import pytest
from tokenizers import ByteLevelBPETokenizer

from keras_xent.deploy import export_scorer, load_scorer
from keras_xent.deploy.__main__ import main, parser
from tests.backend import environment
from tests.deploy.models import VOCABULARY, language_model

TEXT = "a cat sat on a mat \u2014 na\u00efve \U0001f600\r\n<script>alert('&')</script>\n"


def tokenizer(vocabulary=300):
    """One for each byte, and a few merges."""
    made = ByteLevelBPETokenizer()
    texts = ["a cat sat on a mat"] * 3
    made.train_from_iterator(texts, vocabulary, special_tokens=["[PAD]", "[START]"], show_progress=False)
    return made


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model of a byte-level vocabulary, of which random weights are as good as any."""
    folder, made = tmp_path_factory.mktemp("command"), tokenizer()
    language = language_model(vocabulary=made.get_vocab_size())
    export_scorer(language, folder / "model", endpoints=("score",), tokenizer=made, start_token=1)
    return folder / "model"


def run(*arguments):
    return main(parser().parse_args(["score", *map(str, arguments)]))


def lines(capsys):
    captured = capsys.readouterr()
    return [json.loads(line) for line in captured.out.splitlines()], captured.err


def test_a_text_is_scored_as_its_tokens_are(model, tmp_path, capsys):
    (tmp_path / "text.txt").write_bytes(TEXT.encode())
    assert run(model, tmp_path / "text.txt", "--context", 10, "--stride", 3) == 0
    [line], _ = lines(capsys)
    likelihood = load_scorer(model).score_document(tokenizer().encode(TEXT).ids, context=10, stride=3)
    assert line["file"] == str(tmp_path / "text.txt")
    assert (line["tokens"], line["bytes"]) == (len(likelihood), len(TEXT.encode()))
    assert line["log_likelihood"] == pytest.approx(likelihood.sum())
    assert line["perplexity"] == pytest.approx(np.exp(-likelihood.mean()))
    assert line["bits_per_byte"] == pytest.approx(-likelihood.sum() / np.log(2) / len(TEXT.encode()))


def test_files_that_cannot_be_scored_are_told_and_the_others_scored(model, tmp_path, capsys):
    contents = {"good.txt": b"a cat", "empty.txt": b"", "binary": b"\x89PNG\xff\x00", "also good.txt": b"sat\n"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    files = [tmp_path / name for name in (*contents, "absent.txt", "")]
    assert run(model, *files, "--output", tmp_path / "out.jsonl") == 1
    printed, messages = lines(capsys)
    assert printed == []
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line.get("error") for line in written] == [
        None,
        "The file is empty.",
        "The file is no text in UTF-8 (byte 0).",
        None,
        "No such file or directory",
        "Is a directory",
    ]
    for file, line in zip(files, written, strict=True):
        assert line["file"] == str(file)
        if "error" in line:
            assert f"{file}: {line['error']}\n" in messages
    tokens = sum(line.get("tokens", 0) for line in written)
    total = -sum(line.get("log_likelihood", 0) for line in written) / tokens
    assert f"2 files, {tokens} tokens: perplexity {np.exp(total):.4f}, bits per byte " in messages


class Page(html.parser.HTMLParser):
    """The text of the page's tokens, their titles, and every tag."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.titles, self.shown = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if "title" in dict(attributes):
            self.titles.append(dict(attributes)["title"])

    def handle_data(self, data):
        if self.tags.count("div") == 2:
            self.shown += data


def test_the_page_shows_the_whole_text_and_runs_none_of_it(model, tmp_path, capsys):
    (tmp_path / "text.txt").write_bytes(TEXT.encode())
    assert run(model, tmp_path / "text.txt", "--html", tmp_path / "page.html") == 0
    text = (tmp_path / "page.html").read_text()
    page = Page(text)
    assert page.shown.replace("\u23ce\n", "\n").strip() == TEXT.replace("\r", "").strip()
    assert "script" not in page.tags and "link" not in page.tags and "http" not in text
    nll = -load_scorer(model).score_document(tokenizer().encode(TEXT).ids)
    assert sum(float(title.split()[0]) for title in page.titles) == pytest.approx(nll.sum(), abs=1e-3 * len(nll))


@pytest.mark.parametrize("option", ["--context", "--stride", "--batch-size"])
@pytest.mark.parametrize("value", ["0", "-1", "x", "1.5"])
def test_numbers_of_the_command_line_are_whole_and_above_0(option, value, capsys):
    with pytest.raises(SystemExit) as exit:
        run("model", "file", option, value)
    assert exit.value.code == 2
    assert f"argument {option}: invalid whole number above 0 value: '{value}'" in capsys.readouterr().err


def test_what_is_wrong_before_the_first_file(model, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("a cat")
    (tmp_path / "broken.json").write_text("{")
    export_scorer(language_model(), tmp_path / "bare")
    larger = tmp_path / "larger.json"
    tokenizer().save(str(larger))
    cases = [
        ((tmp_path / "absent",), "error: `path` must be a folder that `export_scorer` has written."),
        ((tmp_path / "bare",), f"error: There is no tokenizer beside '{tmp_path / 'bare'}'. Give its JSON file with"),
        ((model, "--tokenizer", tmp_path / "broken.json"), "broken.json' is no tokenizer of the package tokenizers ("),
        ((model, "--output", tmp_path / "no" / "out"), "error: [Errno 2] No such file or directory"),
        ((tmp_path / "bare", "--tokenizer", larger), f"`token_ids` must be numbers from 0 to {VOCABULARY - 1}, since"),
    ]
    for arguments, sentence in cases:
        assert run(arguments[0], tmp_path / "text.txt", *arguments[1:]) == 1
        assert sentence in capsys.readouterr().err


def test_as_a_command_it_exits_with_the_status(model, tmp_path):
    (tmp_path / "text.txt").write_text("a cat")
    command = [sys.executable, "-m", "keras_xent.deploy", "score", model, "text.txt", "absent.txt"]
    child = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert child.returncode == 1
    first, second = map(json.loads, child.stdout.splitlines())
    assert first["tokens"] > 0
    assert second == {"file": "absent.txt", "error": "No such file or directory"}
