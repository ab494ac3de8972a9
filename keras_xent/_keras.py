"""Everything here is private to Keras, or reads Keras' own stack frames: the one file to look at when Keras changes.

Written for Keras 3.12 to 3.15. Each function names what it replaces, so that it can go when Keras makes it public.
"""

import contextlib
import sys
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

import keras
import numpy
from keras.src.backend import get_keras_mask, set_keras_mask
from keras.src.backend.common.stateless_scope import get_stateless_scope

from keras_xent._types import Tensor

_TRAINERS = tuple(f"backend.{backend}.trainer" for backend in ("tensorflow", "jax"))
_CORES = tuple(f"backend.{backend}.core" for backend in ("tensorflow", "jax"))
_LOOPS = {"fit": True, "train_on_batch": True, "evaluate": False, "test_on_batch": False, "predict": False}
_LOSS = "compute_loss_and_updates"
_STEPS = ("train_step", "test_step", _LOSS)
_FRAMEWORKS = ("keras_xent", "keras", "tensorflow", "jax")

# The mask that Keras left on a tensor, or None, where `keras.losses.Loss` looks for it.
mask_of, set_mask = get_keras_mask, set_keras_mask
# The scope in which JAX runs a step of Keras, or None.
stateless_scope = get_stateless_scope


# What a Keras activation leaves on its output: the logits before it.
LOGITS = "_keras_logits"


def logits_of(tensor: Tensor) -> Tensor:
    """The logits that a Keras activation left on its output, or None."""
    return getattr(tensor, LOGITS, None)


def activation_at_work() -> tuple[str, Any] | None:
    """The name and the axis of the activation of Keras that calls this, where it leaves the logits on its output."""
    frame = _frame_of("activations.activations", variable="output")
    return None if frame is None else (frame.f_code.co_name, frame.f_locals.get("axis"))


class Producer(NamedTuple):
    """The layer that made a symbolic tensor, and the layer's input in that call."""

    layer: Any
    input: Any


def producer(tensor: Any) -> Producer:
    """The layer that made a symbolic tensor of Keras (`_keras_history`, `_inbound_nodes`)."""
    history = tensor._keras_history
    tensors = history.operation._inbound_nodes[history.node_index].input_tensors
    return Producer(history.operation, tensors[0] if tensors else None)


def ancestors(tensor: Any, limit: int = 30) -> Iterator[tuple[Any, Any]]:
    """Yields the layers on the path to a symbolic tensor of Keras, nearest first, and their outputs."""
    waiting, seen = [tensor], set()
    for one in waiting:
        history = getattr(one, "_keras_history", None)
        if history is None or id(one) in seen:
            continue
        seen.add(id(one))
        yield history.operation, one
        if len(waiting) < limit:
            waiting += history.operation._inbound_nodes[history.node_index].input_tensors


def symbolic_output(predictions: Tensor) -> Any:
    """The symbolic output of the model of this step that `predictions` are the value of; None if that is not known."""
    frame = _frame_of("trainers.trainer", "compute_loss")
    # Before the first step Keras may compute a loss of tensors that nothing has made.
    if frame is None or is_building():
        return None
    leaves = keras.tree.flatten(frame.f_locals.get("y_pred"))
    outputs = getattr(frame.f_locals.get("self"), "outputs", None) or []
    found = [output for leaf, output in zip(leaves, outputs, strict=False) if leaf is predictions]
    return found[0] if len(leaves) == len(outputs) and len(found) == 1 else None


def is_building() -> bool:
    """Returns whether Keras computes shapes, before the first step, by which it builds losses and metrics."""
    return any(_frame_of(module, "compute_output_spec") for module in _CORES)


def only_output() -> Any:
    """The symbolic output of the model of this step, if it has one and only one; for metrics, which get no other."""
    outputs = getattr(model_of_step(), "outputs", None) or []
    return outputs[0] if len(outputs) == 1 else None


def all_layers(model: Any, *, include_self: bool = True) -> Iterator[Any]:
    """A model's layers, those inside of layers included (`_flatten_layers`)."""
    return model._flatten_layers(include_self=include_self)


def set_call(layer: Any, call: Any, quantized_call: Any) -> None:
    """Gives a layer, rather than its class, the functions that Keras calls; their parameters are those of the class's.

    Set past the tracking of Keras, which takes what is set for a part of the layer, and saves and copies it.
    """
    object.__setattr__(layer, "carries_provenance", True)
    for name, function in (("call", call), ("quantized_call", quantized_call)):
        object.__setattr__(layer, name, types.MethodType(function, layer))


def set_metric(model: Any, name: str, metric: Any) -> None:
    """Makes a metric an attribute of a model, of one that is built too (`_tracker`), in place of the one before."""
    tracker = model._tracker
    was_locked, tracker.locked = tracker.locked, False
    tracker.untrack(getattr(model, name, None))
    setattr(model, name, metric)
    tracker.locked = was_locked


def variables_of_loading() -> dict[str, Any]:
    """The variables of the function of Keras that now reads the weights of a list of layers (`saving_lib`)."""
    return getattr(_frame_of("saving.saving_lib", variable="container"), "f_locals", {})


def is_training_step() -> bool:
    """Returns whether the nearest loop of Keras that calls this trains, for layers whose `call` has no `training`."""
    for frame in _frames():
        module = str(frame.f_globals.get("__name__")).removeprefix("keras.src.")
        if module in _TRAINERS and frame.f_code.co_name in _LOOPS:
            return _LOOPS[frame.f_code.co_name]
    return False


def set_direction(metric: Any, direction: str) -> None:
    """Tells EarlyStopping and ModelCheckpoint whether "up" or "down" is better (`_direction`)."""
    metric._direction = direction


def batches_seen(optimizer: Any) -> Any:
    """The variable in which an optimizer counts batches; `iterations` counts updates. None if there is none."""
    # The first of possibly thousands.
    named = (one for one in getattr(optimizer, "variables", ()) if one.name == "iteration")
    return next(named, getattr(optimizer, "iterations", None))


@contextlib.contextmanager
def training_state(model: Any) -> Iterator[None]:
    """Metrics and counters of a model in `fit`, read inside, have the values that the steps so far have given them.

    On JAX the variables are empty between two steps, and `fit` holds their values (`_jax_state`). Unlike
    `jax_state_sync` this copies nothing and leaves the state with `fit`, so that the next step stays as fast as it was.
    """
    state = getattr(model, "_jax_state", None)
    if not state or not any(map(_is_empty, model.metrics_variables[:1])):
        yield
        return
    pairs = list(zip(model.metrics_variables, state.get("metrics_variables") or (), strict=False))
    if getattr(model, "optimizer", None) is not None:
        counters = zip(model.optimizer.variables, state.get("optimizer_variables") or (), strict=False)
        # The rest are moments of the weights.
        pairs += [(variable, value) for variable, value in counters if not variable.shape]
    with keras.StatelessScope(state_mapping=pairs):
        yield


def _is_empty(variable):
    try:
        return variable.value is None
    except TypeError:
        # It would call its initializer, which it had when it was built.
        return True


class Step(NamedTuple):
    """The arguments from which a step of Keras on JAX computes its loss, as flat lists."""

    y_true: list[Any]
    y_pred: list[Any]
    sample_weight: list[Any]


def data_of_step() -> Step | None:
    """Labels, predictions and weights of the step of Keras that calls this on JAX (`compute_loss_and_updates`)."""
    frame = _frame_of(_TRAINERS[1], _LOSS)
    if frame is None:
        return None
    given = frame.f_locals
    return Step(*(keras.tree.flatten(given.get(name)) for name in ("y", "y_pred", "sample_weight")))


def inputs_of_step() -> Any:
    """The `x` of the step whose loss or metrics are computed, of Keras or a model's own; None outside of steps."""
    for frame in _frames():
        code = frame.f_code
        if code.co_name in _STEPS:
            if str(frame.f_globals.get("__name__")).startswith("keras.src."):
                return frame.f_locals.get("x")
            given = [frame.f_locals.get(name) for name in code.co_varnames[: code.co_argcount]]
            # `self`, on JAX the state, and the data last.
            if len(given) > 1 and isinstance(given[0], keras.Model):
                return keras.utils.unpack_x_y_sample_weight(given[-1])[0]
    return None


def class_weight_of_fit() -> Any:
    """The `class_weight` of the `fit` that calls this, of which Keras has made sample weights; or None."""
    return _arguments_of_fit().get("class_weight")


def labels_of_fit(labels: Tensor, rows: int = 256) -> Any:
    """The first labels that the `fit` that calls this was given as one array; None if it was given something else."""
    given = _arguments_of_fit().get("y")
    fits = isinstance(given, numpy.ndarray) and given.ndim == len(labels.shape)
    return given[:rows] if fits and given.dtype.kind in "iuf" and given.size else None


def _arguments_of_fit() -> Any:
    frame = _frame_of(_TRAINERS[0], "fit") or _frame_of(_TRAINERS[1], "fit")
    return {} if frame is None else frame.f_locals


def callbacks_of_loop() -> list[Any]:
    """The callbacks of the nearest `fit` or `evaluate` that calls this."""
    found = [_frame_of(module, name) for module in _TRAINERS for name in ("evaluate", "fit")]
    given = [None if frame is None else frame.f_locals.get("callbacks") for frame in found]
    return next((list(getattr(one, "callbacks", ())) for one in given if one is not None), [])


def output_mask_is_lost(predictions: Tensor) -> bool:
    """Returns whether metrics of a step on JAX are updated outside its gradient, for an output with a mask."""
    frame = _frame_of(_TRAINERS[1], "train_step")
    outputs = [] if frame is None else getattr(frame.f_locals.get("self"), "outputs", None) or []
    return any(mask_of(output) is not None and len(output.shape) == len(predictions.shape) for output in outputs)


def is_given_as_loss(metric: Any) -> bool:
    """Returns whether Keras calls a metric as the function of a loss (`LossFunctionWrapper`)."""
    frame = _frame_of("losses.losses", "call")
    return frame is not None and getattr(frame.f_locals.get("self"), "fn", None) is metric


def _frames() -> Iterator[types.FrameType]:
    """The frames of the functions that call this, innermost first."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _frame_of(module: str, function: str = "", *, variable: str = "") -> types.FrameType | None:
    """The innermost frame of a function of Keras that calls this, or of any that has a variable of this name."""
    for frame in _frames():
        named = variable in frame.f_code.co_varnames if variable else frame.f_code.co_name == function
        if named and frame.f_globals.get("__name__") == f"keras.src.{module}":
            return frame
    return None


def model_of_step() -> Any:
    """The Keras model whose `fit` or `evaluate` calls this, or None.

    Only frames of Keras' trainers are looked into: reading the variables of a user's frame would keep them alive.
    """
    for frame in _frames():
        if str(frame.f_globals.get("__name__")).startswith("keras.src.") and "self" in frame.f_code.co_varnames:
            model = frame.f_locals.get("self")
            if isinstance(model, keras.Model):
                return model
    return None


def metrics_of_step() -> list[Any] | None:
    """The metrics that the step of Keras which calls this on TensorFlow updates; None where that is not known.

    A step that a user has written may update any metric.
    """
    frame = _frame_of(_TRAINERS[0], "train_step") or _frame_of(_TRAINERS[0], "test_step")
    model = None if frame is None else frame.f_locals.get("self")
    own = {} if model is None else vars(model)
    if model is None or type(model).compute_metrics is not keras.Model.compute_metrics or "compute_metrics" in own:
        return None
    # Those that were given to `compile` are inside one of the model's metrics, which names them once it is built.
    return [one for outer in model.metrics for one in (outer, *keras.tree.flatten(list(vars(outer).values())))]


def is_loss_scaled() -> bool | None:
    """Returns whether the optimizer of the calling step scales the loss and skips infinite steps; None: unknown."""
    optimizer = getattr(model_of_step(), "optimizer", None)
    return None if optimizer is None else isinstance(optimizer, keras.optimizers.LossScaleOptimizer)


def stacklevel_of_user() -> int:
    """The `stacklevel` with which the caller's `warnings.warn` names the line of the user's own program."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back and str(frame.f_globals.get("__name__")).partition(".")[0] in _FRAMEWORKS:
        level, frame = level + 1, frame.f_back
    return level
