"""The shapes that are measured, and that the tests of the kernels run on: real ones, by name."""

from typing import NamedTuple


class Shape(NamedTuple):
    """Logits of `rows` examples or tokens over `classes`."""

    name: str
    rows: int
    classes: int


class Head(NamedTuple):
    """Hidden states `[tokens, features]` under an output matrix `[features, classes]`."""

    name: str
    tokens: int
    features: int
    classes: int


SMALL_BATCH = Shape("small_batch", 32, 10)
BATCH = Shape("batch", 128, 10)
SEGMENTATION = Shape("segmentation", 65_536, 10)  # one image of 256 x 256 pixels
IMAGENET = Shape("imagenet", 4096, 1000)  # one large batch
LANGUAGE_MODEL = Shape("language_model", 2048, 32_000)  # 8 texts of 256 tokens
LARGE_VOCABULARY = Shape("large_vocabulary", 256, 131_072)  # one text, the tokens of Mistral's tekken

SHAPES = (SMALL_BATCH, BATCH, SEGMENTATION, IMAGENET, LANGUAGE_MODEL, LARGE_VOCABULARY)

SMALL_MODEL = Head("small_model", 2048, 256, 32_000)
GPT2 = Head("gpt2", 512, 768, 50_257)  # the smallest GPT-2, one text of half its length; 50,257 is 29 x 1733
MANY_TOKENS = Head("many_tokens", 8192, 256, 32_000)
WORD_PIECES = Head("word_pieces", 2048, 256, 8192)  # so few classes that the logits fit into one chunk

HEADS = (SMALL_MODEL, GPT2, WORD_PIECES)

GEMMA2 = Head("gemma2", 2048, 2304, 256_000)  # Gemma 2 2B (arXiv:2408.00118, table 1)

# Of a GPU, which a few texts do not fill.
TOKENS_OF_GPU = Shape("tokens_of_gpu", 4096, 32_000)
LARGE_VOCABULARY_BATCH = Shape("large_vocabulary_batch", 1024, 131_072)
MODEL_OF_GPU = Head("model_of_gpu", 8192, 2048, 32_000)
LLAMA3 = Head("llama3", 4096, 4096, 128_256)  # Llama 3 8B (arXiv:2407.21783, table 3)

# Shares of valid labels: all, half as in dialogues, and those of masked language models.
VALID = (1.0, 0.5, 0.15)
