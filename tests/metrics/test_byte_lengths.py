"""The bytes of a vocabulary's tokens: those of the text that the tokens were made from."""

import pytest

from keras_xent.metrics import bytes_of_tokens
from keras_xent.metrics.byte_lengths import _BYTE_CHARACTERS


@pytest.mark.parametrize(
    "vocabulary, expected",
    [
        # Byte-level: U+0120 is a space, and each of the two others is a byte of a Cyrillic letter.
        ({"\u0120the": 0, "\u00d0\u00b0": 1}, [4, 2]),
        # A token of raw spaces, and one with characters of another alphabet, were added to a byte-level vocabulary.
        (["\u0120the", "\u00c3\u00a9", "a", "    "], [4, 2, 1, 4]),
        (["\u0120the", "\u00c3\u00a9", "<\uff5cbegin\u2581of\u2581sentence\uff5c>"], [4, 2, 29]),
        (["\u0120the", "\u0120#", "##", "###a"], [4, 2, 2, 4]),
        (["\u2581the", "<0x0A>", "\u20ac", "\u2581\u2581", "the\u2581"], [4, 1, 3, 2, 4]),
        # U+0120 is a letter too.
        (["\u2581the", "\u2581\u0120", "\u0120a"], [4, 3, 3]),
        (["a", "\u20ac", " "], [1, 3, 1]),
        # Every byte of the byte-level alphabet, and no word.
        (sorted(_BYTE_CHARACTERS), [1] * 256),
        ([], []),
        ({}, []),
    ],
)
def test_the_alphabet_is_seen_and_each_token_read_by_itself(vocabulary, expected):
    assert bytes_of_tokens(vocabulary) == expected


@pytest.mark.parametrize(
    "alphabet, expected",
    [
        ("byte_level", [4, 1, 6, 5, 6, 2]),
        ("sentencepiece", [5, 2, 1, 5, 6, 4]),
        ("wordpiece", [5, 2, 6, 3, 6, 4]),
        ("bpe_end_of_word", [5, 2, 6, 5, 2, 4]),
        ("plain", [5, 2, 6, 5, 6, 4]),
    ],
)
def test_a_stated_alphabet_is_used(alphabet, expected):
    tokens = ["\u0120the", "\u00e9", "<0x0A>", "##ing", "it</w>", "\u00d0\u00b0"]
    assert bytes_of_tokens(tokens, alphabet=alphabet) == expected


def test_special_tokens_have_no_bytes_and_added_ones_are_text():
    tokens = ["\u0120the", "\u00e9", "[PAD]"]
    assert bytes_of_tokens(tokens, special="[PAD]", added="\u00e9") == [4, 2, 0]
    assert bytes_of_tokens(tokens, special=["[PAD]"], added=["\u00e9"]) == [4, 2, 0]
    # What is special or added does not tell the alphabet.
    assert bytes_of_tokens(["\u2581<s>", "\u0120a", "##b"], special=["\u2581<s>"], added=["##b"]) == [0, 2, 3]


def test_end_of_word_after_bytes():
    """CLIP writes text as the characters of its bytes, and then `</w>`."""
    tokens = [*sorted(_BYTE_CHARACTERS), *(character + "</w>" for character in sorted(_BYTE_CHARACTERS))]
    assert bytes_of_tokens([*tokens, "caf\u00c3\u00a9</w>"], alphabet="bpe_end_of_word") == [1] * 512 + [5]


@pytest.mark.parametrize(
    "vocabulary, alphabet, example",
    [(["play", "##ing"], "wordpiece", "##ing"), (["a</w>"], "bpe_end_of_word", "a</w>")],
)
def test_alphabets_without_spaces_are_refused_unless_stated(vocabulary, alphabet, example):
    with pytest.raises(ValueError) as error:
        bytes_of_tokens(vocabulary)
    assert str(error.value) == (
        f"`vocabulary` does not record where the text has spaces: it is that of '{alphabet}', with tokens such as "
        f"'{example}'. To count the bytes of the words alone, say alphabet='{alphabet}'; the bits per byte of a text "
        "need the number of bytes of that text."
    )


@pytest.mark.parametrize("vocabulary, example", [(["a", "\u00e9"], "\u00e9"), (["\u0120a", "\u2581a"], "\u0120a")])
def test_tokens_that_could_be_text_or_bytes_are_refused(vocabulary, example):
    with pytest.raises(ValueError) as error:
        bytes_of_tokens(vocabulary)
    assert str(error.value) == (
        f"`alphabet` must be stated for this vocabulary, whose tokens, such as '{example}', do not show whether their "
        "characters are text or bytes. Give alphabet='byte_level', 'sentencepiece' or 'plain'. "
        "Received: alphabet='auto'."
    )


def test_an_unknown_alphabet_is_refused():
    with pytest.raises(
        ValueError, match="`alphabet` must be one of 'auto', 'byte_level', .* Received: alphabet='utf8'."
    ):
        bytes_of_tokens(["a"], alphabet="utf8")


TEXT = "Na\u00efve caf\u00e9s cost 5 \u20ac, \u4e2d\u6587 too.\n" * 3


def test_bytes_of_a_trained_byte_level_tokenizer_add_up_to_the_text():
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([TEXT], 300, special_tokens=["[PAD]"], show_progress=False)
    tokenizer.add_tokens(["    ", "\u4e2d\u6587", "caf\u00e9s"])
    sizes = bytes_of_tokens(tokenizer.get_vocab(), special=["[PAD]"], added=["caf\u00e9s"])
    assert sizes[0] == 0
    for text in (TEXT, "caf\u00e9s    \u4e2d\u6587"):
        assert sum(sizes[i] for i in tokenizer.encode(text).ids) == len(text.encode())


def test_bytes_of_a_trained_sentencepiece_tokenizer_add_up_to_the_text():
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.SentencePieceBPETokenizer()
    tokenizer.train_from_iterator([TEXT], 300, special_tokens=["<unk>"], show_progress=False)
    sizes = bytes_of_tokens(tokenizer.get_vocab(), special=["<unk>"])
    # SentencePiece puts a space before the text.
    assert sum(sizes[i] for i in tokenizer.encode("cafes cost 5").ids) == len(" cafes cost 5")


def test_a_vocabulary_with_a_gap_is_refused():
    with pytest.raises(ValueError) as error:
        bytes_of_tokens({"a": 0, "b": 2})
    assert str(error.value) == (
        "`vocabulary` must number its tokens from 0 without a gap. Received: 2 tokens with numbers up to 2."
    )
