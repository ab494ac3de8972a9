"""What every loss shares: labels left as they are, masks and weights, reduction, complete configuration."""

import abc
import inspect
from typing import Any, NamedTuple

import keras
from keras import ops

from keras_xent import arguments, source
from keras_xent.kernels import targets
from keras_xent.kernels._compile import as_written
from keras_xent.kernels.reduction import REDUCTIONS, reduce


class Elements(NamedTuple):
    """Losses before reduction, and what reducing them needs to know."""

    losses: Any
    # False for elements without a label; None if all have one.
    labelled: Any = None
    # The class weight of each element's label; None if all are 1.
    label_weights: Any = None


class Crossentropy(keras.losses.Loss):
    """Base of the losses. A subclass gives `_elements`, the losses before reduction, and its arguments as attributes.

    It does not use `keras.losses.Loss.__call__`, which casts labels to a float type and logits to a float32 copy.
    """

    _activation = "softmax"
    _labels_have_masks = False
    # Defaults of arguments that not every loss has.
    axis = -1
    z_loss = 0.0
    logit_softcap: float | None = None
    normalizer: float | None = None

    def __init__(self, *, from_logits: bool, reduction: str | None, name: str | None, dtype: Any) -> None:
        if reduction not in REDUCTIONS:
            raise ValueError(
                f"`reduction` must be one of {', '.join(map(repr, REDUCTIONS))}. Received: reduction={reduction!r}."
            )
        self._given_dtype = arguments.dtype_or_none("dtype", dtype)
        super().__init__(name=name, reduction=None, dtype=self._given_dtype)
        self.reduction = reduction
        self.from_logits = arguments.boolean("from_logits", from_logits)
        self._warned: set[str] = set()

    @as_written
    def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        """The reduced loss, a scalar of the loss's dtype (of the shape of the losses for reduction None)."""
        given = (y_true, y_pred, sample_weight)
        mask = source.keras_mask(y_pred)
        with keras.name_scope(self.name), targets.called("y_true", "y_pred"):
            y_true, logits = self._inputs(y_true, y_pred)
            axis = targets.checked_axis(self.axis, len(logits.shape), "predictions")
            shape = tuple(size for i, size in enumerate(logits.shape) if i != axis)
            valid = label_mask = weights = weighted = None
            if mask is not None:
                mask = ops.cast(mask, "bool")
                if self._labels_have_masks and targets.same_shape(mask.shape, logits.shape):
                    label_mask = mask
                else:
                    valid = targets.aligned_weights(mask, shape, "mask", like=logits, without=axis)
            if sample_weight is not None:
                sample_weight = targets.to_tensor(arguments.tensor("sample_weight", sample_weight))
                weights = targets.aligned_weights(sample_weight, shape, like=logits, without=axis)
                weighted = ops.not_equal(weights, 0)
            elements = self._elements(y_true, logits, valid, label_mask, weighted)
            if elements.labelled is not None:
                valid = elements.labelled if valid is None else ops.logical_and(valid, elements.labelled)
            self._leave(given, elements.losses, valid, logits)
            loss = reduce(
                elements.losses,
                reduction=self.reduction,
                valid=valid,
                weights=weights,
                label_weights=elements.label_weights,
                normalizer=self.normalizer,
            )
            return ops.cast(loss, self.dtype)

    @as_written
    def call(self, y_true: Any, y_pred: Any) -> Any:
        """The losses before masks, weights and reduction."""
        with targets.called("y_true", "y_pred"):
            y_true, logits = self._inputs(y_true, y_pred)
            return ops.cast(self._elements(y_true, logits, None, None, None).losses, self.dtype)

    @abc.abstractmethod
    def _elements(self, y_true: Any, logits: Any, valid: Any, label_mask: Any, weighted: Any) -> Elements:
        """Losses of the shape of the logits without `axis`. They may be anything where `valid` is False.

        `label_mask` masks single labels of an element, for losses whose elements have several. Where `weighted` is
        False the weight is 0: the loss is used as the derivative for that weight, if it is finite.
        """

    def _leave(self, given: tuple, losses: Any, valid: Any, logits: Any) -> None:
        """Leaves what the metrics of the same step can use, for losses that know such a thing."""

    def _inputs(self, y_true, y_pred):
        y_true = arguments.tensor("y_true", y_true)
        y_pred = arguments.tensor("y_pred", y_pred)
        return targets.to_tensor(y_true), self._logits(source.read(y_pred))

    def _logits(self, y_pred):
        activation, behind = source.origin(y_pred, self._activation)
        if self.from_logits and behind is not None:
            self._warn_of_activation(y_pred, activation or self._activation)
        if not self.from_logits and behind is None:
            self._warn_of_logits(y_pred)
        known = self.from_logits or (behind is not None and activation in (None, self._activation))
        if not known and (self.z_loss or self.logit_softcap):
            raise ValueError(
                "`z_loss` and `logit_softcap` need logits, and `y_pred` holds probabilities of which the logits are "
                "not known. End the model in logits and set from_logits=True."
            )
        return source.as_logits(
            y_pred,
            from_logits=self.from_logits,
            activation=self._activation,
            dtype="float64" if self.dtype == "float64" else None,
        )

    def _warn_of_activation(self, y_pred, activation):
        use = "uses the logits before it" if activation == self._activation else "takes its output for logits"
        self._warn_once(
            "from_logits",
            f"{type(self).__name__} has from_logits=True, but {source.layer_of(y_pred)} ends in a {activation}. The "
            f"loss {use}. Remove the activation, or set from_logits=False.",
        )

    def _warn_of_logits(self, y_pred):
        why = None if "from_logits" in self._warned else source.why_no_probabilities(y_pred)
        if why is not None:
            self._warn_once(
                "from_logits",
                f"{type(self).__name__} has from_logits=False, but the output of {source.layer_of(y_pred)} {why}. The "
                "loss takes it for probabilities. If these are logits, set from_logits=True.",
            )

    def _warn_once(self, about, sentence):
        if about not in self._warned:
            self._warned.add(about)
            arguments.warn(sentence)

    def get_config(self) -> dict[str, Any]:
        """Every argument of the constructor, at the value given."""
        names = [name for name in inspect.signature(type(self).__init__).parameters if name != "self"]
        config = {name: getattr(self, name) for name in names if name != "dtype"}
        return {**config, "dtype": self._given_dtype}
