"""Parts of TensorBoard beside single curves: a page of charts, and a table of runs and their settings."""

import glob
import os
import uuid
from collections.abc import Mapping
from typing import Any

from keras import ops

from keras_xent.callbacks._metric_reader import PerplexityMetric

_LONGEST = 200


def page(names: list[str], perplexities: list[PerplexityMetric], has_batches: bool, gradient_norm: bool) -> Any:
    """A page of custom scalars: training against validation, and what tells how the optimization goes.

    Args:
        names: the metrics of the model.
        perplexities: those among them that are ours.
        has_batches: whether batches are written.
        gradient_norm: whether the norm of the gradient is.
    """
    from tensorboard.plugins.custom_scalar import layout_pb2, summary

    others = [name for name in names if name not in {one.name for one in perplexities}]
    others.sort(key=lambda name: name != "loss")
    quality: list[tuple[str, ...]] = []
    for one in perplexities:
        # In nats, since a perplexity falls by decades and these charts have no logarithmic axis to begin with.
        quality.append((f"loss in nats per token ({one.name})", f"units/{one.tag('nll')}"))
        quality.append(("generalization gap in nats: validation - train", f"gap/{one.tag('nll')}"))
        if one.metric.groups:
            quality.append((f"{one.name} by group", *(f"epoch_{one.metric.name}/{g}" for g in one.metric.groups)))
    quality += [(name, f"epoch_{name}") for name in others]
    progress = [("learning rate", "optimizer/learning_rate" if has_batches else "epoch_learning_rate")]
    if gradient_norm and has_batches:
        progress.append(("gradient norm", "optimizer/gradient_norm"))
    if perplexities:
        progress.append(("valid tokens per second", "tokens/per_second"))
        progress += [("share of valid tokens", f"tokens/{one.tag('valid_share')}") for one in perplexities]
    # TensorBoard 2.21 draws charts of margins in reverse (`_insertItem` of its tf-category-paginated-view).
    categories = [
        layout_pb2.Category(title=title, chart=[_chart(layout_pb2, *chart) for chart in reversed(charts)])
        for title, charts in (("train and validation", quality), ("optimization", progress))
    ]
    return summary.pb(layout_pb2.Layout(category=categories))


def _chart(layout_pb2, title, *tags):
    # TensorBoard smooths charts of lines by default, which draws a loss that falls too high. Charts of
    # margins are not; this one's margin has no width.
    lines = [layout_pb2.MarginChartContent.Series(value=tag, lower=tag, upper=tag) for tag in tags]
    return layout_pb2.Chart(title=title, margin=layout_pb2.MarginChartContent(series=lines))


def settings(model: Any, params: dict[str, Any], more: Mapping[Any, Any]) -> dict[str, bool | float | str]:
    """The settings of a run as one flat table: loss, optimizer, size and length of the training, and `more`."""
    optimizer = getattr(model.optimizer, "inner_optimizer", model.optimizer)
    table = {
        **_flat("loss", model.loss),
        **_flat("optimizer", optimizer),
        "parameters": model.count_params() if model.built else None,
        "epochs": params.get("epochs"),
        "steps_per_epoch": params.get("steps"),
    }
    for key, value in more.items():
        # The keys of `tensorboard.plugins.hparams.api` are objects with a name.
        table |= _flat(_text(getattr(key, "name", key)), value)
    return {_text(name): _plain(value) for name, value in table.items() if value is not None}


def mapping_of(hparams: Any) -> Mapping[Any, Any]:
    """The argument `hparams` as a mapping."""
    # The `HyperParameters` of KerasTuner have their values in an attribute.
    found = getattr(hparams, "values", None) if not isinstance(hparams, Mapping) else hparams
    if hparams is not None and not isinstance(found, Mapping):
        raise ValueError(
            "`hparams` must be None, a dict of settings, or the HyperParameters of KerasTuner. "
            f"Received: a {type(hparams).__name__}."
        )
    return found or {}


def begun(settings: dict[str, Any]) -> Any:
    """The summary that begins a run in the table.

    There is none of the experiment: TensorBoard finds the columns in the runs, and one of ours would hide those of
    another tool.
    """
    from tensorboard.plugins.hparams import summary_v2

    return summary_v2.hparams_pb(settings, trial_id=uuid.uuid4().hex)


def has_settings(folder: str) -> bool:
    """Returns whether a tuner or an earlier `fit` writes the settings of the run in this folder; the first one counts.

    A file that is still empty may be that of a tuner that begins right now.
    """
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    for path in glob.glob(os.path.join(glob.escape(folder), "events.out.tfevents.*")):
        tags = [value.tag for event in EventFileLoader(path).Load() for value in event.summary.value]
        if not tags or "_hparams_/session_start_info" in tags:
            return True
    return False


def finished() -> Any:
    """The summary that ends a run in the table."""
    from tensorboard.plugins.hparams import api_pb2, summary

    return summary.session_end_pb(api_pb2.STATUS_SUCCESS)


def _flat(name, value):
    """The entries of a setting: those of a dict, a list, or of the configuration of an object."""
    if isinstance(value, Mapping):
        return {key: one for part, item in value.items() for key, one in _flat(f"{name}/{_text(part)}", item).items()}
    if isinstance(value, list | tuple) and any(hasattr(item, "get_config") for item in value):
        return {key: one for part, item in enumerate(value) for key, one in _flat(f"{name}/{part}", item).items()}
    if hasattr(value, "get_config") and not isinstance(value, type):
        return {name: type(value).__name__, **_config(name, value)}
    return {name: value}


def _config(name, value):
    try:
        config = value.get_config()
        return {f"{name}/{_text(k)}": one for k, one in config.items() if one is not None and k != "name"}
    # The configuration is the user's own code, and no reason to end the training.
    except Exception:
        return {}


def _plain(value):
    """The value as the table can hold it."""
    # TensorBoard leaves out numbers that are not finite.
    if isinstance(value, bool | int | float) and abs(value) < 1e300:
        return value
    try:
        array = ops.convert_to_numpy(value) if hasattr(value, "shape") and hasattr(value, "dtype") else None
        if array is not None and array.dtype.kind in "biuf":
            return array.item() if not array.shape else _text(array.tolist())
    # A layer has a dtype as an array has one.
    except Exception:
        pass
    return _text(value)


def _text(value):
    if callable(value) and hasattr(value, "__name__"):
        value = value.__name__
    elif hasattr(value, "get_config"):
        value = type(value).__name__
    try:
        text = str(value)
    except Exception:
        text = type(value).__name__
    return text[:_LONGEST].encode("utf-8", "replace").decode()
