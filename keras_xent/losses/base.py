"""What every loss shares: labels left as they are, masks and weights, reduction, complete configuration."""

import abc
import inspect
from typing import Any, NamedTuple

import keras
from keras import ops

from keras_xent import _keras, arguments, provenance
from keras_xent._backend import no_autograph
from keras_xent._types import DType, Tensor
from keras_xent.kernels._dtypes import to_tensor
from keras_xent.kernels._shapes import align_weights, checked_axis, same_shape
from keras_xent.kernels.reduction import REDUCTIONS, reduce


class Unreduced(NamedTuple):
    """Losses before reduction, and what the reduction needs to know of them."""

    losses: Tensor
    # False for elements without a label; None if all have one.
    has_label: Tensor = None
    # The class weight of each element's label; None if all are 1.
    label_weights: Tensor = None


class Alignment(NamedTuple):
    """The mask and the weights of the losses; None where there are none."""

    # Booleans that broadcast against the losses.
    valid: Tensor = None
    # A mask of single labels, of the shape of the logits, for losses whose elements have several labels.
    label_mask: Tensor = None
    # Numbers that broadcast against the losses.
    weights: Tensor = None

    @property
    def nonzero_weight(self) -> Tensor:
        """False where the weight is 0; None without weights."""
        return None if self.weights is None else ops.not_equal(self.weights, 0)


class Crossentropy(keras.losses.Loss):
    """Base of the losses. A subclass has `_unreduced`, the losses before reduction, and its arguments as attributes.

    It does not use `keras.losses.Loss.__call__`, which casts labels to a float type and logits to a float32 copy.
    """

    _activation = "softmax"
    _labels_have_masks = False
    # Defaults of arguments that not every loss has.
    axis = -1
    z_loss = 0.0
    logit_softcap: float | None = None
    normalizer: float | None = None

    def __init__(self, *, from_logits: bool, reduction: str | None, name: str | None, dtype: DType) -> None:
        if reduction not in REDUCTIONS:
            raise ValueError(
                f"`reduction` must be one of {', '.join(map(repr, REDUCTIONS))}. Received: reduction={reduction!r}."
            )
        self._given_dtype = arguments.dtype_or_none("dtype", dtype)
        super().__init__(name=name, reduction=None, dtype=self._given_dtype)
        self.reduction = reduction
        self.from_logits = arguments.boolean("from_logits", from_logits)
        self._warned: set[str] = set()

    @no_autograph
    def __call__(self, y_true: Tensor, y_pred: Tensor, sample_weight: Tensor = None) -> Tensor:
        """The reduced loss, a scalar of the loss's dtype (of the shape of the losses for reduction None)."""
        given = (y_true, y_pred, sample_weight)
        mask = _keras.mask_of(y_pred)
        with keras.name_scope(self.name), arguments.named("y_true", "y_pred"):
            y_true, logits = self._labels_and_logits(y_true, y_pred)
            aligned = self._align(logits, mask, sample_weight)
            unreduced = self._unreduced(y_true, logits, aligned)
            valid = aligned.valid
            if unreduced.has_label is not None:
                valid = unreduced.has_label if valid is None else ops.logical_and(valid, unreduced.has_label)
            self._publish_statistics(given, unreduced.losses, valid, logits)
            loss = reduce(
                unreduced.losses,
                reduction=self.reduction,
                valid=valid,
                weights=aligned.weights,
                label_weights=unreduced.label_weights,
                normalizer=self.normalizer,
            )
            return ops.cast(loss, self.dtype)

    @no_autograph
    def call(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        """The losses before masks, weights and reduction."""
        with arguments.named("y_true", "y_pred"):
            y_true, logits = self._labels_and_logits(y_true, y_pred)
            return ops.cast(self._unreduced(y_true, logits, Alignment()).losses, self.dtype)

    @abc.abstractmethod
    def _unreduced(self, y_true: Tensor, logits: Tensor, aligned: Alignment) -> Unreduced:
        """Losses of the shape of the logits without `axis`. They may be anything where `aligned.valid` is False.

        Where the weight is 0, the loss is used as the derivative for that weight, if it is finite.
        """

    def _publish_statistics(self, given: tuple, losses: Tensor, valid: Tensor, logits: Tensor) -> None:
        """Hands what the metrics of the same step can use to them, for losses that have such a thing."""

    def _align(self, logits: Tensor, mask: Tensor, sample_weight: Tensor) -> Alignment:
        axis = checked_axis(self.axis, len(logits.shape), "predictions")
        shape = tuple(size for i, size in enumerate(logits.shape) if i != axis)
        valid = label_mask = weights = None
        if mask is not None:
            mask = ops.cast(mask, "bool")
            if self._labels_have_masks and same_shape(mask.shape, logits.shape):
                label_mask = mask
            else:
                valid = align_weights(mask, shape, "mask", like=logits, without=axis)
        if sample_weight is not None:
            sample_weight = to_tensor(arguments.tensor("sample_weight", sample_weight))
            weights = align_weights(sample_weight, shape, like=logits, without=axis)
        return Alignment(valid, label_mask, weights)

    def _labels_and_logits(self, y_true: Tensor, y_pred: Tensor) -> tuple[Tensor, Tensor]:
        y_true = arguments.tensor("y_true", y_true)
        y_pred = arguments.tensor("y_pred", y_pred)
        return to_tensor(y_true), self._logits(provenance.read_variable(y_pred))

    def _logits(self, y_pred: Tensor) -> Tensor:
        activation, logits = provenance.activation_and_logits(y_pred, self._activation)
        if self.from_logits and logits is not None:
            self._warn_of_activation(y_pred, activation or self._activation)
        if not self.from_logits and logits is None:
            self._warn_of_logits(y_pred)
        known = self.from_logits or (logits is not None and activation in (None, self._activation))
        if not known and (self.z_loss or self.logit_softcap):
            raise ValueError(
                "`z_loss` and `logit_softcap` need logits, and `y_pred` holds probabilities of which the logits are "
                "not known. End the model in logits and set from_logits=True."
            )
        return provenance.as_logits(
            y_pred,
            from_logits=self.from_logits,
            activation=self._activation,
            dtype="float64" if self.dtype == "float64" else None,
        )

    def _warn_of_activation(self, y_pred: Tensor, activation: str) -> None:
        use = "uses the logits before it" if activation == self._activation else "takes its output as logits"
        self._warn_once(
            "from_logits",
            f"{type(self).__name__} has from_logits=True, but {provenance.layer_of(y_pred)} ends in a {activation}. "
            f"The loss {use}. Remove the activation, or set from_logits=False.",
        )

    def _warn_of_logits(self, y_pred: Tensor) -> None:
        why = None if "from_logits" in self._warned else provenance.describe_invalid_probabilities(y_pred)
        if why is not None:
            self._warn_once(
                "from_logits",
                f"{type(self).__name__} has from_logits=False, but the output of {provenance.layer_of(y_pred)} {why}. "
                "The loss takes it for probabilities. If these are logits, set from_logits=True.",
            )

    def _warn_once(self, about: str, message: str) -> None:
        if about not in self._warned:
            self._warned.add(about)
            arguments.warn(message)

    def get_config(self) -> dict[str, Any]:
        """Every argument of the constructor, at the value given."""
        names = [name for name in inspect.signature(type(self).__init__).parameters if name != "self"]
        config = {name: getattr(self, name) for name in names if name != "dtype"}
        return {**config, "dtype": self._given_dtype}
