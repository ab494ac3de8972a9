"""Losses for `keras.distillation.Distiller`."""

from keras_xent.distillation.logits_distillation import LogitsDistillation

__all__ = ["LogitsDistillation"]
