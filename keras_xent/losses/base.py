"""The base class of the losses: labels that are not cast, masks and weights, reduction, complete configuration."""

import abc
import contextvars
import functools
from typing import NamedTuple

import keras
from keras import ops

from keras_xent import _accumulation, _endings, _keras, _words, arguments, provenance
from keras_xent._backend import is_eager, no_autograph, on_any_mesh
from keras_xent._named_arguments import NamedArguments
from keras_xent._types import DType, Tensor
from keras_xent.kernels._dtypes import dtype_of, to_tensor
from keras_xent.kernels._masking import both
from keras_xent.kernels._shapes import align_weights, checked_axis, ensure_shape, same_shape
from keras_xent.kernels.reduction import checked_reduction
from keras_xent.losses import _accumulation_warning, _one_program
from keras_xent.losses._fused import call_reads_logits
from keras_xent.losses._swapped import refuse_swapped


class Unreduced(NamedTuple):
    """Losses before reduction, and what the reduction needs to know of them."""

    losses: Tensor
    # False for elements without a label; None if all have one.
    has_label: Tensor = None
    # The class weight of each element's label; None if all are 1.
    label_weights: Tensor = None
    # Sample weights of the shape of these losses, in place of those of the alignment; `has_label` has the mask in it.
    weights: Tensor = None


class Alignment(NamedTuple):
    """The mask and the weights of the losses; None where there are none."""

    # Booleans that broadcast against the losses.
    valid: Tensor = None
    # A mask of single labels, of the shape of the logits, for losses whose elements have several labels.
    label_mask: Tensor = None
    # Numbers that broadcast against the losses.
    weights: Tensor = None
    # Numbers of the shape of the logits, for losses whose elements have several labels.
    weights_of_labels: Tensor = None

    @property
    def nonzero_weight(self) -> Tensor:
        """False where the weight is 0; None without weights."""
        return None if self.weights is None else ops.not_equal(self.weights, 0)


class _Given(NamedTuple):
    """The arguments of a user's `call`, as they were before the casts of Keras."""

    y_true: Tensor
    y_pred: Tensor
    cast: tuple[Tensor, Tensor]
    mask: Tensor
    sample_weight: Tensor


_given: contextvars.ContextVar[_Given | None] = contextvars.ContextVar("_given", default=None)


class Crossentropy(NamedArguments, _one_program.HasProgram, keras.losses.Loss):
    """Base of the losses. A subclass has `_unreduced`, the losses before reduction, and its arguments as attributes.

    It does not use `keras.losses.Loss.__call__`, which casts labels to a float type and logits to a float32 copy; only
    the `call` of a user's subclass gets what Keras would give it.
    """

    _activation = "softmax"
    # What to do instead of the `class_weight` of `fit` for several labels to an example; empty where that is right.
    _instead_of_class_weight = ""
    _elements_have_labels = False
    # Whether labels are numbers from 0 to 1 rather than indices of classes.
    _takes_probabilities = True
    # Defaults of arguments that not every loss has.
    axis = -1
    z_loss = 0.0
    logit_softcap: float | None = None
    normalizer: float | None = None

    def __init__(self, *, from_logits: bool, reduction: str | None, name: str | None, dtype: DType) -> None:
        self._given_dtype = arguments.dtype_or_none("dtype", dtype)
        super().__init__(name=name, reduction=None, dtype=self._given_dtype)
        self.reduction = checked_reduction(reduction)
        self.from_logits = arguments.boolean("from_logits", from_logits)
        self._warned = set()

    @no_autograph
    def __call__(self, y_true: Tensor, y_pred: Tensor, sample_weight: Tensor = None) -> Tensor:
        """The reduced loss, a scalar of the loss's dtype (of the shape of the losses for reduction None)."""
        _accumulation_warning.warn_of_accumulation(self, y_pred, sample_weight)
        if self._overrides_call():
            return self._reduce_overridden(y_true, y_pred, sample_weight)
        if not hasattr(y_pred, "shape"):
            # A list or a number, which has no mask, and no attributes for metrics.
            y_pred = to_tensor(y_pred, "y_pred")
        self._warn_of_class_weight(y_true, sample_weight)
        given = (y_true, y_pred, sample_weight)
        mask = _keras.mask_of(y_pred)
        if _accumulation.is_counting():
            # Targets have the shape of the logits, which a graph would compute for their shape alone.
            y_true = y_true if len(y_true.shape) >= len(y_pred.shape) else ops.expand_dims(y_true, -1)
            y_pred = ops.zeros_like(y_true, dtype="float32")
        with keras.name_scope(self.name), _words.named("y_true", "y_pred"):
            y_true, logits = self._labels_and_logits(y_true, y_pred)
            of_logits = on_any_mesh(functools.partial(self._loss_of_logits, given))
            return of_logits(y_true, logits, mask, sample_weight)

    def _loss_of_logits(
        self, given: tuple, y_true: Tensor, logits: Tensor, mask: Tensor, sample_weight: Tensor
    ) -> Tensor:
        aligned = self._align(logits, mask, sample_weight)
        if aligned.label_mask is None and aligned.weights_of_labels is None:
            found = _one_program.reduced(self, y_true, logits, aligned.valid, aligned.weights)
            if found is not None:
                self._publish_statistics(given, *found[1:], logits)
                return ops.cast(found[0], self.dtype)
        unreduced = self._unreduced(y_true, logits, aligned)
        valid, weights = unreduced.has_label, unreduced.weights
        if weights is None:
            valid, weights = both(aligned.valid, valid), aligned.weights
        if not _accumulation.is_counting():
            self._publish_statistics(given, unreduced.losses, valid, logits)
        return self._reduce(unreduced.losses, valid, weights, unreduced.label_weights)

    def _reduce(self, losses: Tensor, valid: Tensor, weights: Tensor, label_weights: Tensor) -> Tensor:
        counting = {"valid": valid, "weights": weights, "label_weights": label_weights}
        loss = _accumulation.reduce(losses, reduction=self.reduction, normalizer=self.normalizer, **counting)
        return ops.cast(loss, self.dtype)

    @no_autograph
    def call(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        """The losses before masks, weights and reduction. A subclass may override it, as any `call` of Keras."""
        given, aligned = _given.get(), Alignment()
        if given is not None:
            # What Keras has cast is read as it was: integers as integers, 16-bit logits where they came from.
            y_true = given.y_true if y_true is given.cast[0] else y_true
            y_pred = given.y_pred if y_pred is given.cast[1] else y_pred
        with _words.named("y_true", "y_pred"):
            y_true, logits = self._labels_and_logits(y_true, y_pred)
            if given is not None and y_pred is given.y_pred:
                aligned = self._align(logits, given.mask, given.sample_weight)
            losses = self._unreduced(y_true, logits, aligned).losses
            # Outside of `__call__`, as in the functions, float64 keeps its digits, as in Keras. Lists have no dtype.
            keeps_float64 = given is None and hasattr(y_pred, "dtype") and dtype_of(losses) == "float64"
            return losses if keeps_float64 else ops.cast(losses, self.dtype)

    def _overrides_call(self) -> bool:
        return getattr(self.call, "__func__", None) is not Crossentropy.call

    def _reduce_overridden(self, y_true: Tensor, y_pred: Tensor, sample_weight: Tensor) -> Tensor:
        """Applies masks, weights and reduction to the losses that a user's `call` returns."""
        arguments.tensor("y_true", y_true)
        arguments.tensor("y_pred", y_pred)
        head = provenance.head_of(y_pred)
        if head is not None and not is_eager(y_pred):
            self._warn_once("call", call_reads_logits(self, head))
        mask, y_pred = _keras.mask_of(y_pred), provenance.read_variable(y_pred)
        cast = tuple(ops.convert_to_tensor(tensor, dtype=self.dtype) for tensor in (y_true, y_pred))
        token = _given.set(_Given(y_true, y_pred, cast, mask, sample_weight))
        try:
            with keras.name_scope(self.name):
                losses = self.call(*cast)
        finally:
            _given.reset(token)
        masks = mask, _keras.mask_of(losses)
        losses = ops.convert_to_tensor(losses, dtype="float64" if self.dtype == "float64" else "float32")
        if not len(losses.shape):
            # Keras gives the weights of a loss that is one number to that number.
            weights = 1.0 if sample_weight is None else ops.cast(to_tensor(sample_weight), losses.dtype)
            losses, sample_weight = losses * weights, None
            return self._reduce(losses, None, None, None) if len(losses.shape) else ops.cast(losses, self.dtype)
        with _words.named("y_true", "y_pred"):
            aligned = [align_weights(one, losses.shape, "mask") for one in masks]
            has_label, label_weights = self._labels_of_losses(to_tensor(y_true), to_tensor(y_pred), losses)
            valid = functools.reduce(both, aligned, has_label)
            weights = align_weights(sample_weight, losses.shape)
        return self._reduce(losses, valid, weights, label_weights)

    def _labels_of_losses(self, y_true: Tensor, y_pred: Tensor, losses: Tensor) -> tuple[Tensor, Tensor]:
        """Returns which losses have a label, and the label's class weight; None where losses have several labels."""
        return None, None

    @abc.abstractmethod
    def _unreduced(self, y_true: Tensor, logits: Tensor, aligned: Alignment) -> Unreduced:
        """Losses of the shape of the logits without `axis`. They may be anything where `aligned.valid` is False.

        Where the weight is 0, the loss is used as the derivative for that weight, if it is finite.
        """

    def _unreduced_in_program(self, y_true: Tensor, logits: Tensor, valid: Tensor, weights: Tensor) -> Unreduced:
        """The losses of rows, inside the one program of `_one_program`."""
        return self._unreduced(y_true, logits, Alignment(valid, weights=weights))

    def _publish_statistics(self, given: tuple, losses: Tensor, valid: Tensor, logits: Tensor) -> None:
        """Hands what the metrics of the same step can use to them, for losses that have such a thing."""

    def _align(self, logits: Tensor, mask: Tensor, sample_weight: Tensor) -> Alignment:
        axis = checked_axis(self.axis, len(logits.shape), "predictions")
        shape = tuple(size for i, size in enumerate(logits.shape) if i != axis)
        valid = label_mask = weights = weights_of_labels = None
        if mask is not None:
            if self._elements_have_labels and same_shape(mask.shape, logits.shape):
                label_mask = ops.cast(mask, "bool")
            else:
                valid = align_weights(mask, shape, "mask", like=logits, without=axis)
        if sample_weight is not None:
            sample_weight = to_tensor(sample_weight, "sample_weight")
            if self._elements_have_labels and logits.shape[axis] != 1 and same_shape(sample_weight.shape, logits.shape):
                weights_of_labels = ensure_shape(
                    sample_weight, logits, "`sample_weight` per label must have the shape of `y_pred`."
                )
            else:
                weights = align_weights(sample_weight, shape, like=logits, without=axis)
        return Alignment(valid, label_mask, weights, weights_of_labels)

    def _labels_and_logits(self, y_true: Tensor, y_pred: Tensor) -> tuple[Tensor, Tensor]:
        y_true = arguments.tensor("y_true", y_true)
        y_pred = arguments.tensor("y_pred", y_pred)
        y_true = to_tensor(y_true)
        refuse_swapped(y_true, y_pred, self._takes_probabilities)
        return y_true, self._logits(provenance.read_variable(y_pred))

    def _logits(self, y_pred: Tensor) -> Tensor:
        axis = self.axis if isinstance(self.axis, int) and len(y_pred.shape) else -1
        checked_axis(axis, len(y_pred.shape), "predictions") if self._activation == "softmax" else None
        activation, logits = provenance.activation_and_logits(y_pred, self._activation, axis)
        if self.from_logits and not is_eager(y_pred) and logits is None:
            # Of what JAX traces only the layers of the model tell.
            end = _endings.ending(y_pred)
            if end is not None and end.kind in ("softmax", "sigmoid"):
                self._warn_of_activation(y_pred, end.kind, is_known=False)
        if self.from_logits and logits is not None:
            self._warn_of_activation(y_pred, str(activation))
        if not self.from_logits and logits is None:
            self._warn_of_logits(y_pred)
        known = self.from_logits or (logits is not None and activation == self._activation)
        if not known and (self.z_loss or self.logit_softcap):
            raise ValueError(
                "`z_loss` and `logit_softcap` need logits, and `y_pred` holds probabilities of which the logits are "
                "not known. End the model in logits and set from_logits=True."
            )
        return provenance.as_logits(
            y_pred,
            from_logits=self.from_logits,
            activation=self._activation,
            axis=axis,
            dtype="float64" if self.dtype == "float64" else None,
        )

    def _warn_of_class_weight(self, y_true: Tensor, sample_weight: Tensor) -> None:
        """Says that the `class_weight` of `fit` is wrong for several labels to an example."""
        shape = tuple(getattr(arguments.tensor("y_true", y_true), "shape", ()))
        if not self._instead_of_class_weight or sample_weight is None or len(shape) < 2 or shape[-1] == 1:
            return
        if "class_weight" not in self._warned and _keras.class_weight_of_fit() is not None:
            self._warn_once(
                "class_weight",
                f"`class_weight` of `fit` is wrong for labels of shape {shape}: Keras makes one weight per example of "
                f"it, by the position of the example's largest label. {self._instead_of_class_weight}",
            )

    def _warn_of_activation(self, y_pred: Tensor, activation: str, *, is_known: bool = True) -> None:
        is_undone = is_known and activation == self._activation
        use = "uses the logits before it" if is_undone else "takes its output as logits"
        ends_in = "a softmax over another axis" if activation == "other" else f"a {activation}"
        self._warn_once(
            "from_logits",
            f"{type(self).__name__} has from_logits=True, but {_endings.layer_of(y_pred)} ends in {ends_in}. "
            f"The loss {use}. Remove the activation, or set from_logits=False.",
        )

    def _warn_of_logits(self, y_pred: Tensor) -> None:
        why = None if "from_logits" in self._warned else _endings.describe_invalid_probabilities(y_pred)
        if why is not None:
            self._warn_once(
                "from_logits",
                f"{type(self).__name__} has from_logits=False, but the output of {_endings.layer_of(y_pred)} {why}. "
                "The loss takes it for probabilities. If these are logits, set from_logits=True.",
            )
