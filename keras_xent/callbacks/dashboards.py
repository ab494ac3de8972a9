"""What TensorBoard shows beside single curves: a page of charts, and a table of runs and their settings."""

import re
import uuid
from typing import Any

from keras import ops


def layout(perplexed: list[Any]) -> Any:
    """A page of custom scalars: train against validation and the gap between them, then the batches."""
    from tensorboard.plugins.custom_scalar import layout_pb2, summary

    def chart(title, *tags):
        lines = layout_pb2.MultilineChartContent(tag=[f"^{re.escape(tag)}$" for tag in tags])
        return layout_pb2.Chart(title=title, multiline=lines)

    epochs, batches = [], []
    for one in perplexed:
        epochs += [
            chart(f"{one.name}: train against validation", f"epoch_{one.name}"),
            chart(
                "generalization gap: nats of validation less nats of train", f"epoch_{one.named('generalization_gap')}"
            ),
            chart("nats per token", f"epoch_{one.named('nll')}"),
            chart("bits per token", f"epoch_{one.named('bits_per_token')}"),
        ]
        batches += [
            chart(f"{one.name} of the batches", f"batch_{one.name}"),
            chart("share of the tokens that count", f"batch_{one.named('valid_share')}"),
        ]
    batches += [
        chart("tokens per second", "tokens_per_second"),
        chart("learning rate", "batch_learning_rate", "epoch_learning_rate"),
        chart("gradient norm", "batch_gradient_norm"),
    ]
    categories = [
        layout_pb2.Category(title="perplexity", chart=epochs),
        layout_pb2.Category(title="batches", chart=batches, closed=True),
    ]
    return summary.pb(layout_pb2.Layout(category=categories))


def hparams(model: Any, params: dict[str, Any], more: dict[str, Any]) -> dict[str, bool | float | str]:
    """The settings of a run as one flat table: loss, optimizer, size and length of the training, and `more`."""
    table = {
        **_flat("loss", model.loss),
        **_flat("optimizer", model.optimizer),
        "parameters": model.count_params() if model.built else None,
        "epochs": params.get("epochs"),
        "steps_per_epoch": params.get("steps"),
        **more,
    }
    return {name: _plain(value) for name, value in table.items() if value is not None}


def hparams_summaries(settings: dict[str, Any], perplexed: list[Any]) -> list[Any]:
    """The summaries that begin a run: what its settings and its results are called, and its settings."""
    from tensorboard.plugins.hparams import api, summary_v2

    metrics = []
    for one in perplexed:
        metrics += [
            api.Metric(f"{prefix}{one.name}", display_name=f"final {prefix}{one.name}") for prefix in ("val_", "")
        ]
        # TensorBoard finds what is in the runs below only where the folder of this run is not all that it is shown.
        metrics.append(api.Metric(f"epoch_{one.name}", group="validation", display_name=f"last epoch_{one.name}"))
    config = summary_v2.hparams_config_pb([api.HParam(name) for name in settings], metrics)
    return [config, summary_v2.hparams_pb(settings, trial_id=uuid.uuid4().hex)]


def finished() -> Any:
    """The summary that ends a run."""
    from tensorboard.plugins.hparams import api_pb2, summary

    return summary.session_end_pb(api_pb2.STATUS_SUCCESS)


def _flat(name, thing):
    if thing is None or isinstance(thing, str):
        return {name: thing}
    if isinstance(thing, dict | list | tuple):
        parts = thing.items() if isinstance(thing, dict) else enumerate(thing)
        return {key: value for part, one in parts for key, value in _flat(f"{name}/{part}", one).items()}
    if not hasattr(thing, "get_config"):
        return {name: getattr(thing, "__name__", str(thing))}
    config = {key: value for key, value in thing.get_config().items() if value is not None and key != "name"}
    return {name: type(thing).__name__, **{f"{name}/{key}": value for key, value in config.items()}}


def _plain(value):
    if hasattr(value, "dtype"):
        value = ops.convert_to_numpy(value).item() if not value.shape else ops.convert_to_numpy(value).tolist()
    return value if isinstance(value, bool | int | float | str) else str(value)[:200]
