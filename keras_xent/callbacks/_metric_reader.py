"""Reads the metrics of a model from outside its steps, when asked and only then."""

import contextlib
import math
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_xent._backend import to_numpy
from keras_xent._keras import training_state
from keras_xent.callbacks._units import sibling_tag, to_nats, units_of
from keras_xent.metrics import Perplexity
from keras_xent.metrics._token_mean import Totals

# All metrics of these packages are sums, or functions of sums: the difference of two readings is that of the batches
# between them.
_SUMMING = {"keras", "keras_hub", "keras_xent"}


class PerplexityMetric(NamedTuple):
    """A metric of perplexity, and its name in the logs."""

    metric: Perplexity
    name: str

    def tag(self, unit: str) -> str:
        """The name of the same mean in another unit."""
        return sibling_tag(self.name, unit)

    def units(self, totals: Totals) -> dict[str, float]:
        """The mean cross-entropy of these tokens in all its units, and their number."""
        nll = totals.total / totals.denominator if totals.denominator else math.nan
        return {**units_of(self.name, nll), self.tag("tokens"): totals.tokens}

    def epoch_units(self, totals: Totals | None, reported: float | None) -> dict[str, float]:
        """The units of a perplexity that Keras has reported: from these totals, if they are of the same tokens.

        They are not if the model was evaluated in between.
        """
        units = {} if totals is None else self.units(totals)
        if reported is None or units and np.isclose(units[self.name], reported, rtol=1e-3, equal_nan=True):
            return units
        return {**units_of(self.name, to_nats(reported)), self.name: reported}


class MetricReader:
    """Reads the metrics of a model that is trained or evaluated."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self._perplexities: list[PerplexityMetric] = []
        self._named: list[tuple[str, Any]] = []
        self.reset()

    def reset(self) -> None:
        """The metrics of the model have been reset."""
        self._arrays_before: dict[int, np.ndarray] = {}
        self._totals_before: dict[str, Totals] = {}

    def perplexities(self) -> list[PerplexityMetric]:
        """The metrics of perplexity of the model, under their names in the logs.

        Those that were given to `compile` exist once the model has seen a batch.
        """
        if not self._perplexities:
            with training_state(self.model):
                named = self.metrics()
            self._perplexities = [PerplexityMetric(one, name) for name, one in named if isinstance(one, Perplexity)]
        return self._perplexities

    def totals(self) -> dict[str, Totals]:
        """The sums of the metrics of perplexity since their reset, by name. Waits for the device."""
        with training_state(self.model):
            return {one.name: one.metric.totals() for one in self.perplexities()}

    def new_totals(self) -> dict[str, Totals]:
        """The same since the last call of this."""
        before, self._totals_before = self._totals_before, self.totals()
        nothing = Totals(*[0.0] * len(Totals._fields))
        for name, now in self._totals_before.items():
            if now.labels <= before.get(name, nothing).labels and now != before.get(name):
                # `train_on_batch` has reset the metrics.
                before, self._arrays_before = {}, {}
        return {
            name: Totals(*np.subtract(now, before.get(name, nothing)).tolist())
            for name, now in self._totals_before.items()
        }

    def new_values(self) -> dict[str, float]:
        """The values of all metrics over the batches since the last call of this, but for those of perplexity.

        A metric of another package than Keras' may be no sum. Its value is the one since the last reset.
        """
        values: dict[str, float] = {}
        with training_state(self.model):
            for name, metric in self.metrics():
                if isinstance(metric, Perplexity):
                    continue
                new = self._new_arrays(metric.variables) if _is_sum(metric) else []
                if _is_mean(metric):
                    # The same as below, without the time that small operations take.
                    total, count = new
                    values[name] = float(total / count) if count else 0.0
                    continue
                state = [(v, ops.convert_to_tensor(a, v.dtype)) for v, a in zip(metric.variables, new, strict=False)]
                with keras.StatelessScope(state_mapping=state) if state else contextlib.nullcontext():
                    values.update(_numbers(name, metric.result()))
        return values

    def _new_arrays(self, variables):
        """Returns the increase of each sum since the last call."""
        now = [to_numpy(variable) for variable in variables]
        new = [array - self._arrays_before.get(id(v), 0) for v, array in zip(variables, now, strict=True)]
        self._arrays_before |= {id(v): array for v, array in zip(variables, now, strict=True)}
        return new

    def metrics(self) -> list[tuple[str, Any]]:
        """The metrics of the model by their names in the logs; those of `compile` exist after the first batch."""
        if self._named:
            return self._named
        named, is_built = [], True
        for metric in self.model.metrics:
            compiled = getattr(metric, "metrics", None)
            if compiled is None and getattr(metric, "is_in_logs", True):
                named.append((metric.name, metric))
            elif compiled:
                # What was given to `compile`. Names of several outputs begin with that of the output.
                with training_state(self.model):
                    names = list(metric.result())
                names = names if len(names) == len(compiled) else [one.name for one in compiled]
                named += zip(names, compiled, strict=True)
            elif compiled is not None:
                is_built = False
        self._named = named if is_built else []
        return named


def _is_sum(metric):
    return type(metric).__module__.partition(".")[0] in _SUMMING


def _is_mean(metric):
    return (
        _is_sum(metric) and isinstance(metric, keras.metrics.Mean) and type(metric).result is keras.metrics.Mean.result
    )


def _numbers(name, result):
    results = result.items() if isinstance(result, dict) else [(name, result)]
    arrays = {key: ops.convert_to_numpy(value) for key, value in results}
    return {key: float(array) for key, array in arrays.items() if array.size == 1}
