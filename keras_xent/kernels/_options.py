"""Options of the kernels: checked once, hashable, and so the key under which a program is compiled."""

import math
from dataclasses import dataclass
from typing import Any

from keras_xent import arguments


@dataclass(frozen=True)
class SoftmaxOptions:
    """Options that the softmax cross-entropies share."""

    label_smoothing: float = 0.0
    focal_gamma: float = 0.0
    z_loss: float = 0.0
    logit_softcap: float | None = None

    def __post_init__(self) -> None:
        """Checks the values and makes Python floats of them."""
        _store(self, "label_smoothing", float(arguments.fraction("label_smoothing", self.label_smoothing)))
        _store(self, "focal_gamma", float(arguments.not_negative("focal_gamma", self.focal_gamma)))
        _store(self, "z_loss", float(arguments.not_negative("z_loss", self.z_loss)))
        softcap = arguments.positive("logit_softcap", self.logit_softcap)
        _store(self, "logit_softcap", None if softcap is None else float(softcap))


@dataclass(frozen=True)
class SigmoidOptions:
    """Options of the sigmoid cross-entropy; `ignore_class` is "nan" for nan, which is not equal to itself."""

    label_smoothing: float = 0.0
    focal_gamma: float = 0.0
    focal_alpha: float | None = None
    ignore_class: float | str | None = None
    mean_over_labels: bool = False

    def __post_init__(self) -> None:
        """Checks the values and makes Python floats of them."""
        _store(self, "label_smoothing", float(arguments.fraction("label_smoothing", self.label_smoothing)))
        _store(self, "focal_gamma", float(arguments.not_negative("focal_gamma", self.focal_gamma)))
        if self.focal_alpha is not None:
            _store(self, "focal_alpha", float(arguments.fraction("focal_alpha", self.focal_alpha)))
        if self.ignore_class is not None and self.ignore_class != "nan":
            ignored = float(self.ignore_class)
            _store(self, "ignore_class", "nan" if math.isnan(ignored) else ignored)


def _store(options: Any, name: str, value: Any) -> None:
    object.__setattr__(options, name, value)
