"""What the metrics of a model have counted: read from outside the step, when asked and only then."""

import math
import sys
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_xent.metrics import Perplexity
from keras_xent.metrics._token_mean import Totals

# All metrics of these packages are sums, or functions of sums: of two readings the difference is that of the batches
# between them.
_SUMMING = {"keras", "keras_hub", "keras_xent"}

NO_PERPLEXITY = (
    "No perplexity will be logged, since the model has no metric of it. Compile it with "
    "metrics=[keras_xent.metrics.Perplexity()]."
)


class Perplexed(NamedTuple):
    """A metric of perplexity and what its relatives are called in logs."""

    metric: Perplexity
    name: str

    def named(self, unit: str) -> str:
        """What a relative is called; see the function."""
        return named(self.name, unit)

    def values(self, totals: Totals) -> dict[str, float]:
        """The mean cross-entropy of these tokens in all its units, and their number."""
        nll = totals.total / totals.denominator if totals.denominator else math.nan
        values = {"nll": nll, "bits_per_token": nll / math.log(2), "tokens": totals.tokens}
        return {self.name: exponential(nll), **{self.named(unit): value for unit, value in values.items()}}

    def values_of_epoch(self, totals: Totals | None, reported: float | None) -> dict[str, float]:
        """The values of an epoch that Keras has reported: from these totals, if they are of the same tokens.

        They are not where somebody has evaluated the model in between.
        """
        values = {} if totals is None else self.values(totals)
        if reported is None or values and np.isclose(values[self.name], reported, rtol=1e-3, equal_nan=True):
            return values
        return {self.name: reported, **in_units(self.name, reported)}


def named(name: str, unit: str) -> str:
    """`"nll"` for `"perplexity"`, `"decoder_nll"` for `"decoder_perplexity"`, `"ppl_nll"` for `"ppl"`."""
    stem = name.removesuffix("perplexity")
    return f"{stem}{unit}" if stem != name else f"{name}_{unit}"


def in_units(name: str, perplexity: float) -> dict[str, float]:
    """Nats and bits of a perplexity, under the names that go with its own."""
    nll = math.log(perplexity) if perplexity > 0 else math.nan
    return {named(name, "nll"): nll, named(name, "bits_per_token"): nll / math.log(2)}


def exponential(nll: float) -> float:
    """The perplexity of a mean cross-entropy in nats."""
    return math.exp(nll) if nll < math.log(np.finfo("float64").max) else math.inf if nll == nll else nll


def is_running(*names: str, of: Any) -> bool:
    """Whether methods of these names of a model have called this."""
    running, frame = set(), sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_locals.get("self") is of:
            running.add(frame.f_code.co_name)
    return running >= set(names)


class Readings:
    """Reads the metrics of a model while it is trained or evaluated."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._before: dict[int, np.ndarray] = {}
        self._totals_before: dict[str, Totals] = {}
        self._perplexed: list[Perplexed] = []

    def restart(self) -> None:
        """The metrics have been reset."""
        self._before, self._totals_before = {}, {}

    def wait(self) -> None:
        """Has the variables of the model hold what the steps so far have made of them."""
        if hasattr(self._model, "jax_state_sync"):
            self._model.jax_state_sync()

    def perplexed(self) -> list[Perplexed]:
        """The metrics of perplexity of the model, under the names that logs have for them.

        Waits for the device until there are some: those given to `compile` are there after the first batch.
        """
        if not self._perplexed:
            self.wait()
            self._perplexed = list(self._find_perplexed())
        return self._perplexed

    def _find_perplexed(self):
        for metric in self._model.metrics:
            if isinstance(metric, Perplexity):
                yield Perplexed(metric, metric.name)
            elif inner := getattr(metric, "metrics", None):
                # What was given to `compile`. Names of several outputs begin with that of the output.
                names = list(metric.result())
                names = names if len(names) == len(inner) else [one.name for one in inner]
                pairs = zip(inner, names, strict=True)
                yield from (Perplexed(one, name) for one, name in pairs if isinstance(one, Perplexity))

    def totals(self) -> dict[str, Totals]:
        """What the metrics of perplexity have summed up since they were reset, by name."""
        self.wait()
        return {one.name: one.metric.totals() for one in self.perplexed()}

    def new_totals(self) -> dict[str, Totals]:
        """What they have summed up since the last call of this."""
        before, self._totals_before = self._totals_before, self.totals()
        nothing = Totals(*[0.0] * len(Totals._fields))
        for name, now in self._totals_before.items():
            if now.labels <= before.get(name, nothing).labels and now != before.get(name):
                # `train_on_batch` has reset the metrics.
                before, self._before = {}, {}
        return {
            name: Totals(*np.subtract(now, before.get(name, nothing)).tolist())
            for name, now in self._totals_before.items()
        }

    def new_values(self) -> dict[str, float]:
        """The values of all metrics over the batches since the last call of this.

        A metric of another package than Keras' may be no sum. Of such one it is the value since the last reset.
        """
        self.wait()
        now = {id(variable): (variable, ops.convert_to_numpy(variable)) for variable in self._summing_variables()}
        state = [(v, ops.convert_to_tensor(value - self._before.get(k, 0), v.dtype)) for k, (v, value) in now.items()]
        with keras.StatelessScope(state_mapping=state):
            results = self._model.get_metrics_result()
        self._before = {key: value for key, (_, value) in now.items()}
        arrays = {name: ops.convert_to_numpy(value) for name, value in results.items()}
        return {name: float(value) for name, value in arrays.items() if value.size == 1}

    def _summing_variables(self):
        for metric in self._model.metrics:
            for one in getattr(metric, "metrics", None) or [metric]:
                if type(one).__module__.partition(".")[0] in _SUMMING:
                    yield from one.variables
