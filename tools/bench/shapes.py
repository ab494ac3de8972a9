"""The shapes that are measured: real ones, by name."""

from typing import NamedTuple


class Shape(NamedTuple):
    """Logits of `rows` examples or tokens over `classes`."""

    name: str
    rows: int
    classes: int


LANGUAGE_MODEL = Shape("language_model", 2048, 32_000)  # 8 texts of 256 tokens
IMAGENET = Shape("imagenet", 4096, 1000)  # one large batch
SEGMENTATION = Shape("segmentation", 65_536, 10)  # one image of 256 x 256 pixels

SHAPES = (LANGUAGE_MODEL, IMAGENET, SEGMENTATION)
