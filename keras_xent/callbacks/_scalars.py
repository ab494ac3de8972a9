"""The scalars of TensorBoard and their tags: Keras' for what Keras writes, few groups for what is added."""

import glob
import math
import os
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_xent._backend import to_numpy
from keras_xent._keras import training_state
from keras_xent.callbacks._metric_reader import PerplexityMetric
from keras_xent.callbacks._timeline import Mark
from keras_xent.callbacks._training_log import Batches, Epoch
from keras_xent.callbacks._units import sibling_tag, to_nats
from keras_xent.metrics._token_mean import Totals

# No dashboard shows it: where a training was, for a process that continues it.
_MARK = "keras_xent/mark"


def of_batches(batches: Batches, perplexities: list[PerplexityMetric]) -> dict[str, float]:
    """Keras' tags of the metrics of these batches, and ours of their tokens."""
    named = batches.values | {one.name: one.units(batches.totals[one.name])[one.name] for one in perplexities}
    written = {f"batch_{name}": value for name, value in named.items()}
    return written | nats(batches.totals, perplexities) | _tokens(batches.totals, perplexities, batches.seconds)


def of_logs(logs: dict[str, Any]) -> tuple[dict[str, float], dict[str, float]]:
    """Keras' tags of the logs of an epoch, for `train` and `validation`."""
    numbers = {name: float(value) for name, value in logs.items() if np.ndim(value) == 0}
    train = {f"epoch_{name}": value for name, value in numbers.items() if not name.startswith("val_")}
    return train, {f"epoch_{name[4:]}": value for name, value in numbers.items() if name.startswith("val_")}


def of_evaluation(logs: dict[str, Any]) -> dict[str, float]:
    """Keras' tags of an evaluation."""
    return {f"evaluation_{name}_vs_iterations": float(value) for name, value in logs.items() if np.ndim(value) == 0}


def of_epoch(
    epoch: Epoch, perplexities: list[PerplexityMetric], has_batches: bool
) -> tuple[dict[str, float], dict[str, float]]:
    """Our tags of an epoch, for `train` and `validation`. What its batches have told already is left out."""
    train: dict[str, float] = {}
    validation: dict[str, float] = {}
    for one in perplexities:
        nll, valid = one.tag("nll"), f"tokens/{one.tag('valid')}"
        units = one.epoch_units(epoch.train.get(one.name), epoch.logs.get(one.name))
        validated = one.epoch_units(epoch.validation.get(one.name), epoch.logs.get(f"val_{one.name}"))
        train |= {f"units/{nll}": units[nll]} if units else {}
        if units and validated:
            validation[f"gap/{nll}"] = validated[nll] - units[nll]
        for run, totals in ((train, epoch.train), (validation, epoch.validation)):
            run |= {valid: totals[one.name].tokens} if one.name in totals else {}
    if not perplexities:
        # Metrics of another package.
        for name in (name for name in epoch.logs if name.endswith("perplexity")):
            run = validation if name.startswith("val_") else train
            run[f"units/{sibling_tag(name.removeprefix('val_'), 'nll')}"] = to_nats(epoch.logs[name])
    if has_batches:
        return {tag: value for tag, value in train.items() if perplexities and tag.startswith("tokens/")}, validation
    return train | _tokens(epoch.train, perplexities, epoch.seconds), validation


def nats(totals: dict[str, Totals], perplexities: list[PerplexityMetric]) -> dict[str, float]:
    """The loss per token, in nats."""
    return {
        f"units/{one.tag('nll')}": one.units(totals[one.name])[one.tag("nll")]
        for one in perplexities
        if one.name in totals
    }


def token_rates(totals: dict[str, Totals], perplexities: list[PerplexityMetric], seconds: float) -> dict[str, float]:
    """The share of valid tokens among all labels, and the valid tokens of a second, of the first metric."""
    rates: dict[str, float] = {}
    for one in perplexities:
        if one.name in totals:
            new = totals[one.name]
            rates[one.tag("valid_share")] = new.tokens / new.labels if new.labels else math.nan
            rates.setdefault("per_second", new.tokens / seconds if seconds else math.nan)
    return rates


def _tokens(totals, perplexities, seconds):
    return {f"tokens/{name}": value for name, value in token_rates(totals, perplexities, seconds).items()}


def learning_rates(model: Any) -> dict[str, float]:
    """The learning rate by its name in Keras' logs; those of all optimizers where there are several."""
    optimizer = getattr(model, "optimizer", None)
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    several = getattr(optimizer, "optimizers", None)
    named = {f"learning_rate_{one.name}": one for one in several} if several else {"learning_rate": optimizer}
    with training_state(model):
        return {
            # A schedule computes it.
            name: float(to_numpy(rate) if hasattr(rate := one.learning_rate, "assign") else ops.convert_to_numpy(rate))
            for name, one in named.items()
            if isinstance(one, keras.optimizers.Optimizer)
        }


def summary(scalars: dict[str, float]) -> Any:
    """Scalars as a message of TensorBoard. `tensorboard.plugins.scalar` takes ten times as long to make it."""
    from tensorboard.compat.proto.summary_pb2 import DATA_CLASS_SCALAR, Summary, SummaryMetadata
    from tensorboard.compat.proto.types_pb2 import DT_FLOAT

    # The content of the version of the plugin's data, 0, is empty.
    metadata = SummaryMetadata(plugin_data={"plugin_name": "scalars"}, data_class=DATA_CLASS_SCALAR)
    message = Summary()
    for tag, value in scalars.items():
        one = message.value.add(tag=tag, metadata=metadata)
        one.tensor.dtype = DT_FLOAT
        one.tensor.tensor_shape.SetInParent()
        one.tensor.float_val.append(value)
    return message


def mark_summary(mark: Mark) -> Any:
    """A mark as a message of TensorBoard that none of its pages shows."""
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboard.compat.proto.types_pb2 import DT_INT64

    message = Summary()
    one = message.value.add(tag=_MARK, metadata=SummaryMetadata(plugin_data={"plugin_name": "keras_xent"}))
    one.tensor.dtype = DT_INT64
    one.tensor.tensor_shape.dim.add(size=len(mark))
    one.tensor.int64_val.extend(-1 if number is None else number for number in mark)
    return message


def marks_in_events(folder: str) -> Iterator[Mark]:
    """The marks in the event files of a folder."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    for path in sorted(glob.glob(os.path.join(glob.escape(folder), "events.out.tfevents.*"))):
        for event in EventFileLoader(path).Load():
            for value in event.summary.value:
                if value.tag == _MARK:
                    step, iterations, epoch = (None if number < 0 else number for number in value.tensor.int64_val)
                    yield Mark(step or 0, iterations, epoch)
