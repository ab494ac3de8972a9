"""The loss of the last batch and its worst tokens, judged in the step and left where they can be read after it."""

import inspect
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
from keras import ops

from keras_xent import _accumulation, _backend, _keras, _loss_statistics
from keras_xent._types import Batches, Tensor
from keras_xent.callbacks._unlogged_metric import UnloggedMetric, is_replicated
from keras_xent.callbacks._verdict import Verdict, judge
from keras_xent.losses import SparseCategoricalCrossentropy
from keras_xent.metrics import Perplexity

CONTEXT = 8


class WorstToken(NamedTuple):
    """A token of a batch: its loss in nats, its label, where it is, and the labels before it."""

    nll: float
    label: int
    sequence: int
    position: int
    context: list[int]


class BatchLoss(UnloggedMetric):
    """Loss, mean nll in nats and the `worst` tokens with the largest nll of the last batch that was trained.

    Keras shows labels and predictions of a step to its loss, around which this stands. The step is judged where it is
    computed, since only there its update can still be left out.
    """

    # As a consumer of loss statistics: see `_loss_statistics`.
    needs_statistics: frozenset[str] = frozenset()

    def __init__(self, loss: Any, threshold: float, window: int, worst: int, skip: Batches) -> None:
        super().__init__(name="batch_loss")
        self.of, self.threshold, self.window, self.worst, self.skip = loss, threshold, window, worst, skip
        # In a tuple, where Keras does not look for variables. It computes the values of tokens and sums up none.
        self._tokens = (_tokens_of(loss),)
        self._record: _loss_statistics.LossRecord | None = None
        self._unwatch: Callable[[], None] | None = None
        # A validation computes losses too, and need not say so: `training` is True by default.
        self._is_in_step = False
        # The history of the `fit` that is watched; each has one of its own.
        self._fit: Any = None
        # Of the step: the loss, weighted nll, its weight, valid tokens, and how many micro-batches were added.
        self._sums = self._variable("sums", (5,))
        self._verdict = self._variable("verdict", (len(Verdict._fields),))
        # The values that a spike is measured by, and how many there were; one more is how many steps were left out.
        self._before = self._variable("before", (window,))
        self._counts = self._variable("counts", (2,), "int32")
        self._nll = self._variable("worst_nll", (worst,))
        # Label, sequence, position, and the labels before it; -1 where there is none.
        self._places = self._variable("worst_places", (worst, 3 + CONTEXT), "int32")
        _loss_statistics.register(self)

    def _variable(self, name, shape, dtype="float32"):
        return self.add_variable(shape, initializer="zeros", dtype=dtype, name=name)

    @property
    def knows_tokens(self) -> bool:
        """True if the loss has one value for each token."""
        return self._tokens[0] is not None

    def watches(self, model: Any) -> bool:
        """Returns whether this is what watches the batches of a model, with the loss that it has now."""
        return getattr(model, "_keras_xent_batch_loss", None) is self and self.of is model.loss

    def watch(self, model: Any) -> None:
        """Watches the batches of a model, from the next call of `fit` on until `unwatch` or another `fit`."""
        if is_replicated(model):
            raise ValueError("SpikeDetector does not work under tf.distribute: each replica has a loss of its own.")
        before = getattr(model, "_keras_xent_batch_loss", None)
        if before is not self:
            if before is not None:
                before.unwatch()
            self.attach(model, "_keras_xent_batch_loss")
        self._fit = getattr(model, "history", None)
        if self._unwatch is None:
            self._watch(model)

    def _watch(self, model):
        compute_loss, make_train_function = model.compute_loss, model.make_train_function
        reference: Callable[[], Any] = weakref.ref(model)
        takes_training = "training" in inspect.signature(compute_loss).parameters

        def watched(x=None, y=None, y_pred=None, sample_weight=None, training=True):
            self._record = None
            loss = compute_loss(x, y, y_pred, sample_weight, **({"training": training} if takes_training else {}))
            if self._is_in_step and not _accumulation.is_counting():
                self._observe(loss, y, y_pred, sample_weight)
            self._record = None
            return loss

        train_step = model.train_step

        def observed_step(*state_and_data):
            self._is_in_step = True
            try:
                return train_step(*state_and_data)
            finally:
                self._is_in_step = False

        def made_function(force=False):
            # Keras calls it when a `fit` begins, and no callback where the one before was interrupted.
            if getattr(reference(), "history", None) is not self._fit:
                self.unwatch()
            return make_train_function(force)

        skips = self.skip != "never"
        step = _backend.judged_step(model, observed_step, self._judge, self.variables, skips)
        changed = {"compute_loss": watched, "train_step": step, "make_train_function": made_function}
        # Past the tracking of Keras, which takes what is set for a part of the model.
        before = {name: _backend.replace_own(model, name, value) for name, value in changed.items()}

        def unwatch():
            watched_model = reference()
            if watched_model is not None:
                for name, value in before.items():
                    _backend.restore_own(watched_model, name, value)
                watched_model.train_function = None

        model.train_function, self._unwatch = None, unwatch

    def unwatch(self) -> None:
        """Leaves the model as it was: its next step is compiled without this."""
        if self._unwatch is not None:
            self._unwatch()
            self._unwatch = None

    def receive(self, record: _loss_statistics.LossRecord) -> None:
        """Called on JAX while the loss is computed."""
        self._record = record

    def is_updated_in(self, scope: Any) -> bool:
        """Returns whether the variables of this metric are in a stateless scope."""
        return scope.get_current_value(self._nll) is not None

    def _observe(self, loss: Tensor, y: Tensor, y_pred: Tensor, sample_weight: Tensor) -> None:
        (tokens,) = self._tokens
        sums = ops.convert_to_tensor(self._sums)
        # The sums of the step before stay until the next begins, to be read.
        continues = sums[4] > 0
        sums = ops.where(continues, sums, 0.0)
        nll = weight = num_valid = ops.zeros((), dtype="float32")
        if tokens is not None and hasattr(y, "shape") and hasattr(y_pred, "shape"):
            found = None if self._record is None else tokens._from_record(self._record, sample_weight)
            values, weights, labels = found or tokens._token_values(y, y_pred, sample_weight)
            values = ops.stop_gradient(ops.cast(values, "float32"))
            is_active = ops.not_equal(weights, 0)
            num_valid = ops.sum(ops.cast(is_active, "float32"))
            nll, weight = ops.sum(ops.where(is_active, values * weights, 0.0)), ops.sum(weights)
            # Labels of one sequence: all but the first axis.
            rows = ops.convert_to_tensor(ops.shape(y)[0], dtype="int32")
            length = ops.maximum(ops.cast(ops.size(labels), "int32") // ops.maximum(rows, 1), 1)
            self._observe_tokens(ops.where(is_active, values, float("-inf")), labels, length, continues)
        loss = ops.cast(ops.stop_gradient(loss), "float32") * _accumulation.share_of_rows()
        one = ops.ones((), dtype="float32")
        self._sums.assign(sums + ops.stack([loss, nll, ops.cast(weight, "float32"), num_valid, one]))

    def _observe_tokens(self, values: Tensor, labels: Tensor, length: Tensor, continues: Tensor) -> None:
        labels = ops.cast(ops.reshape(labels, (-1,)), "int32")  # [N]
        missing = ops.full((self.worst,), float("-inf"), dtype="float32")
        values = ops.concatenate([ops.reshape(values, (-1,)), missing])  # [N + worst]
        values, index = _largest(values, self.worst)
        sequence, position = (part[:, None] for part in (index // length, index % length))
        # The token itself and those before it in its sequence.
        back = ops.arange(CONTEXT, -1, -1, dtype="int32")
        places = index[:, None] - back  # [worst, CONTEXT + 1]
        last = ops.cast(ops.size(labels), "int32") - 1
        around = ops.take(labels, ops.clip(places, 0, ops.maximum(last, 0)))
        around = ops.where(ops.logical_and(position >= back, places <= last), around, -1)
        places = ops.concatenate([around[:, -1:], sequence, position, around[:, :-1]], axis=1)
        # Those of the micro-batches before.
        values = ops.concatenate([ops.where(continues, ops.convert_to_tensor(self._nll), missing), values])
        places = ops.concatenate([ops.convert_to_tensor(self._places), places])
        values, index = _largest(values, self.worst)
        self._nll.assign(values)
        self._places.assign(ops.take(places, index, axis=0))

    def _judge(self, gradients: Sequence[Tensor]) -> Tensor:
        """Judges the step whose losses were observed, and returns whether it is to be left out."""
        if isinstance(getattr(_keras.model_of_step(), "optimizer", None), keras.optimizers.LossScaleOptimizer):
            # It looks for steps that are not finite itself, and lowers its scale for them.
            gradients = ()
        sums, counts = ops.convert_to_tensor(self._sums), ops.convert_to_tensor(self._counts)
        before = ops.convert_to_tensor(self._before)
        verdict, kept = judge(sums, gradients, before, counts[0], self.threshold, self.knows_tokens)
        skip = ops.zeros((), dtype="bool") if self.skip == "never" else verdict.is_not_finite
        if self.skip == "always":
            skip = ops.logical_or(skip, verdict.is_spike)
        place = ops.equal(ops.arange(self.window, dtype="int32"), counts[0] % self.window)
        self._before.assign(ops.where(ops.logical_and(place, ops.isfinite(kept)), kept, before))
        added = ops.stack([ops.isfinite(kept), skip])
        self._counts.assign(counts + ops.cast(added, "int32"))
        numbers = [ops.cast(one, "float32") for one in verdict._replace(is_skipped=skip)]
        self._verdict.assign(ops.stack(numbers))
        # The next loss begins a step.
        self._sums.assign(ops.where(ops.arange(5, dtype="int32") < 4, sums, 0.0))
        return skip

    def read(self, model: Any) -> tuple[Verdict, list[WorstToken], int]:
        """The verdict on the last batch, its worst tokens, and how many steps were left out. Waits for the device."""
        if self._unwatch is None:
            raise ValueError("`fit` can have one SpikeDetector only. Received: another one in its `callbacks`.")
        with _keras.training_state(model):
            sums, verdict, counts, nll, places = map(
                ops.convert_to_numpy, (self._sums, self._verdict, self._counts, self._nll, self._places)
            )
        value, mean, spread, *flags = verdict.tolist()
        rows = [(one, *place.tolist()) for one, place in zip(nll.tolist(), places, strict=True)]
        worst = [
            WorstToken(one, label, sequence, position, [c for c in context if c >= 0])
            for one, label, sequence, position, *context in rows[: int(sums[3])]
        ]
        return Verdict(value, mean, spread, *map(bool, flags)), worst, int(counts[1])


def _largest(values, number):
    """The largest values, NaN first, and where they stand."""
    _, index = ops.top_k(ops.where(ops.isnan(values), float("inf"), values), number)
    index = ops.cast(index, "int32")
    return ops.take(values, index), index


def _tokens_of(loss: Any) -> Perplexity | None:
    """Returns the metric that computes the nll of tokens as a sparse loss does; None for another loss."""
    if not isinstance(loss, SparseCategoricalCrossentropy):
        return None
    return Perplexity(
        from_logits=loss.from_logits,
        ignore_class=loss.ignore_class,
        axis=loss.axis,
        logit_softcap=loss.logit_softcap,
        name="watched",
    )
