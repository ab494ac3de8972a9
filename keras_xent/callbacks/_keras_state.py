"""Private names of Keras that the callbacks read, all in one place: the state of a model between two steps of `fit`.

On JAX the variables of a model in training are empty between two steps: `fit` holds their values itself.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import keras
from keras import ops


@contextlib.contextmanager
def current_state(model: Any) -> Iterator[None]:
    """Variables of metrics and optimizer, read inside, have the values that the steps so far have given them.

    Unlike `jax_state_sync` this copies nothing and leaves the state with `fit`, so that a step stays as fast as it was.
    """
    state = getattr(model, "_jax_state", None)
    if not state or getattr(model, "_jax_state_synced", True):
        yield
        return
    pairs = list(zip(model.metrics_variables, state.get("metrics_variables") or (), strict=False))
    if getattr(model, "optimizer", None) is not None:
        counters = zip(model.optimizer.variables, state.get("optimizer_variables") or (), strict=False)
        # The rest are moments of the weights.
        pairs += [(variable, value) for variable, value in counters if not variable.shape]
    with keras.StatelessScope(state_mapping=pairs):
        yield


def batches_counted(optimizer: Any) -> Any:
    """The optimizer's count of batches that it has seen, or None. `iterations` counts updates, not batches."""
    return getattr(optimizer, "_iterations", getattr(optimizer, "iterations", None))


def learning_rates(model: Any) -> dict[str, float]:
    """The learning rate by its name in Keras' logs; those of all optimizers where there are several."""
    optimizer = getattr(model, "optimizer", None)
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    several = getattr(optimizer, "optimizers", None)
    named = {f"learning_rate_{one.name}": one for one in several} if several else {"learning_rate": optimizer}
    with current_state(model):
        return {
            name: float(ops.convert_to_numpy(one.learning_rate))
            for name, one in named.items()
            if isinstance(one, keras.optimizers.Optimizer)
        }
