"""`keras-xent-score`: what it says of files, good and bad, and the page it makes."""

import configparser
import html.parser
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from tokenizers import ByteLevelBPETokenizer, Tokenizer, models, normalizers, pre_tokenizers

from keras_xent.deploy import _documents, export_scorer, load_scorer
from keras_xent.deploy.__main__ import main, parser
from tests.backend import environment
from tests.deploy.models import VOCABULARY, language_model
from tests.tiers import fast_for

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


# Text is data


def scored(model, folder, capsys, content, *options):
    (folder / "text.txt").write_bytes(content)
    assert run(model, folder / "text.txt", *options) == 0
    [line], _ = lines(capsys)
    return {name: value for name, value in line.items() if name != "file"}


def test_text_that_spells_a_special_token_is_text(model, tmp_path, capsys):
    """Each of the characters of "[PAD]" is a token of this vocabulary, and "[PAD]" itself would be masked padding."""
    found = scored(model, tmp_path, capsys, b"a[PAD]cat[START]")
    plain = tokenizer()
    ids = [
        i
        for part in ("a", "[", "P", "A", "D", "]", "cat", "[", "S", "T", "A", "R", "T", "]")
        for i in plain.encode(part).ids
    ]
    likelihood = load_scorer(model).score_document(ids)
    assert (found["tokens"], found["bytes"]) == (len(ids), 16)
    assert found["log_likelihood"] == pytest.approx(likelihood.sum())


def test_a_byte_order_mark_is_no_text(model, tmp_path, capsys):
    assert scored(model, tmp_path, capsys, b"\xef\xbb\xbfa cat") == scored(model, tmp_path, capsys, b"a cat")
    (tmp_path / "mark.txt").write_bytes(b"\xef\xbb\xbf")
    assert run(model, tmp_path / "mark.txt") == 1
    assert lines(capsys)[0][0]["error"] == "The file is empty."


def without_start(folder):
    made = tokenizer()
    export_scorer(language_model(vocabulary=made.get_vocab_size()), folder, endpoints=("score",), tokenizer=made)
    return folder


def test_bytes_are_those_of_the_tokens_that_are_scored(tmp_path, capsys):
    """Without a start token the first token is not scored, which may be a part of the first character."""
    model = without_start(tmp_path / "model")
    for text, size in (("\U0001f600", 3), ("\U0001f600\u00e9a", 6), ("\u00e9", 1), ("ab", 1), ("a cat", 4)):
        found = scored(model, tmp_path, capsys, text.encode())
        assert (found["tokens"], found["bytes"]) == (len(tokenizer().encode(text).ids) - 1, size)
        assert found["bits_per_byte"] == pytest.approx(-found["log_likelihood"] / np.log(2) / size)


def test_bytes_of_tokens_add_up_for_any_tokenizer():
    """Byte-level BPE, byte fallback, words with spaces that no token holds, and a normalizer that writes more."""
    text = "  a \U0001f600\U0001f601 cat \u4e2d\ufb03\n sat \n"
    byte_level = tokenizer()
    alphabet = [chr(97 + i) for i in range(26)]
    fallback = Tokenizer(
        models.BPE(
            vocab=dict(zip(["\u2581", *alphabet, *(f"<0x{i:02X}>" for i in range(256))], range(283), strict=True)),
            merges=[],
            byte_fallback=True,
        )
    )
    fallback.pre_tokenizer = pre_tokenizers.Metaspace()
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "cat": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    longer = Tokenizer(models.WordLevel({"[UNK]": 0, "f": 1}, unk_token="[UNK]"))
    longer.normalizer, longer.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Split("", "isolated")
    for made in (byte_level, fallback, words, longer):
        encoding = made.encode(text)
        sizes = _documents._sizes(text, encoding.tokens, encoding.offsets)
        assert len(sizes) == len(encoding.ids) and min(sizes) >= 0
        assert sum(sizes) == len(text.encode())
    encoding = byte_level.encode(text)
    assert _documents._sizes(text, encoding.tokens, encoding.offsets) == [len(token) for token in encoding.tokens]


def test_each_window_may_begin_with_the_start_token(model, tmp_path, capsys):
    content = b"a cat sat on a mat " * 4
    found = scored(model, tmp_path, capsys, content, "--context", 8, "--stride", 3, "--start-in-every-window")
    ids = tokenizer().encode(content.decode()).ids
    likelihood = load_scorer(model).score_document(ids, context=8, stride=3, start_in_every_window=True)
    assert found["log_likelihood"] == pytest.approx(likelihood.sum())
    assert found != scored(model, tmp_path, capsys, content, "--context", 8, "--stride", 3)


# Where results go


@fast_for("--output")
@pytest.mark.parametrize("option", ["--output", "--html"])
def test_what_is_read_is_never_written_over(model, tmp_path, capsys, option):
    text, link, hard = (tmp_path / name for name in ("text.txt", "link", "hard"))
    text.write_text("a cat")
    link.symlink_to(text)
    hard.hardlink_to(text)
    vocabulary = tmp_path / "tokenizer.json"
    vocabulary.write_text(tokenizer().to_str())
    given = (model, text, "--tokenizer", vocabulary)
    in_model = model / "saved_model.pb"
    before = in_model.read_bytes()
    for path in (text, link, hard, vocabulary, tmp_path / "." / "text.txt", in_model, model / "new.jsonl"):
        assert run(*given, option, path) == 1
        expected = f"error: {option} would overwrite '{path}', which is read. Write to another file.\n"
        assert capsys.readouterr().err == expected
    assert text.read_text() == "a cat" and vocabulary.read_text() == tokenizer().to_str()
    assert in_model.read_bytes() == before and not (model / "new.jsonl").exists()


def test_two_results_do_not_go_to_one_file(model, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("a cat")
    both = tmp_path / "both"
    assert run(model, tmp_path / "text.txt", "--output", both, "--html", both) == 1
    assert capsys.readouterr().err == f"error: --output and --html would both write '{both}'. Write to two files.\n"
    assert run(model, tmp_path / "text.txt", "--output", "/dev/null", "--html", "/dev/null") == 0


FULL_DISK = "error: The results cannot be written (No space left on device).\n"


@pytest.mark.parametrize("option", ["--output", "--html"])
def test_a_full_disk_is_one_line(model, tmp_path, capsys, option):
    (tmp_path / "text.txt").write_text("a cat")
    assert run(model, tmp_path / "text.txt", option, "/dev/full") == 1
    assert capsys.readouterr().err == FULL_DISK


@pytest.mark.parametrize("kind, sentence", [("pipe", "Broken pipe"), ("disk", "No space left on device")])
def test_a_reader_that_is_gone_and_a_full_disk_are_one_line(model, tmp_path, capsys, monkeypatch, kind, sentence):
    (tmp_path / "text.txt").write_text("a cat")
    read, write = os.pipe()
    os.close(read)
    with open("/dev/full" if kind == "disk" else write, "w") as output:
        os.close(write) if kind == "disk" else None
        monkeypatch.setattr("sys.stdout", output)
        assert run(model, tmp_path / "text.txt", tmp_path / "text.txt") == 1
        # What is left does not fail once more at the end.
        output.flush()
    assert capsys.readouterr().err == f"error: The results cannot be written ({sentence}).\n"


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
    # A title has three decimals.
    assert sum(float(title.split()[0]) for title in page.titles) == pytest.approx(nll.sum(), abs=5e-4 * len(nll))


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


def command(folder, *arguments, **options):
    """The console script, as it is installed: a process that calls the function of the entry point."""
    entry = configparser.ConfigParser()
    entry.read(pathlib.Path(__file__).parents[2] / "setup.cfg")
    script = dict(line.split(" = ") for line in entry["options.entry_points"]["console_scripts"].split("\n") if line)
    module, function = script["keras-xent-score"].split(":")
    program = f"import sys; from {module} import {function}; sys.exit({function}())"
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        cwd=folder, env=environment(), stderr=subprocess.PIPE, text=True, **options,
    )  # fmt: skip


def own(errors):
    """What the command itself says: TensorFlow says things too."""
    return [line for line in errors.splitlines() if line.startswith(("error:", "Traceback", "Exception ignored"))]


@pytest.mark.whole
def test_as_a_command_it_exits_with_the_status(model, tmp_path):
    (tmp_path / "text.txt").write_text("a cat")
    child = command(tmp_path, model, "text.txt", "absent.txt", stdout=subprocess.PIPE)
    assert child.returncode == 1
    first, second = map(json.loads, child.stdout.splitlines())
    assert first["tokens"] > 0
    assert second == {"file": "absent.txt", "error": "No such file or directory"}
    assert "absent.txt: No such file or directory\n" in child.stderr and own(child.stderr) == []
    module = [sys.executable, "-m", "keras_xent.deploy", "score", model, "text.txt"]
    again = subprocess.run(module, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert (again.returncode, json.loads(again.stdout)) == (0, first)


@pytest.mark.whole
def test_as_a_command_it_ends_without_a_traceback(model, tmp_path):
    (tmp_path / "text.txt").write_text("a cat")
    read, write = os.pipe()
    os.close(read)
    child = command(tmp_path, model, "text.txt", "text.txt", stdout=write)
    os.close(write)
    assert (child.returncode, own(child.stderr)) == (1, ["error: The results cannot be written (Broken pipe)."])
    with open("/dev/full", "w") as full:
        child = command(tmp_path, model, "text.txt", stdout=full)
    assert (child.returncode, own(child.stderr)) == (1, [FULL_DISK.strip()])
