"""Output layers whose logits a loss computes in chunks, so that all of them are never stored at once."""

import keras

from keras_xent._elsewhere import attribute_error
from keras_xent.layers.fuse_head import fuse_head
from keras_xent.layers.logits_dense import LogitsDense
from keras_xent.layers.tied_logits import TiedLogits
from keras_xent.layers.vocabulary_layout import vocabulary_layout

__all__ = ["LogitsDense", "TiedLogits", "fuse_head", "vocabulary_layout"]


def __getattr__(name: str) -> None:
    raise attribute_error("layers", name, keras.layers)
