"""Heads of `Dense` and `ReversibleEmbedding` layers: their weights, also under LoRA, and how a head is made."""

import functools
from typing import Any, NamedTuple

import keras

from keras_xent import provenance
from keras_xent._backend import snapshot


class HeadLayer(keras.Layer):
    """What `LogitsDense` and `TiedLogits` do otherwise than Keras' layers, and in the same way."""

    # Tells the losses that the logits of this layer come with a head.
    carries_provenance = True
    chunk_bytes: int | None

    def get_config(self) -> dict[str, Any]:
        """Every argument of the constructor."""
        return {**super().get_config(), "chunk_bytes": self.chunk_bytes}

    def quantize(self, mode: Any = None, type_check: bool = True, config: Any = None) -> None:
        """Quantizes the weights as those of Keras' layer. Of modes other than int8 and int4 a loss reads the logits."""
        # Keras refuses subclasses, since their `call` may be another one.
        is_ours = HeadLayer in type(self).__bases__
        super().quantize(mode, type_check=type_check and not is_ours, config=config)

    def rematerialized_call(self, layer_call: Any, *args: Any, **kwargs: Any) -> Any:
        """The call under `keras.RematScope`, whose flags are given before: JAX would trace them."""
        flags = {name: kwargs.pop(name) for name in ("reverse", "training") if isinstance(kwargs.get(name), bool)}
        call = super().rematerialized_call(functools.partial(layer_call, **flags), *args, **kwargs)
        return lambda *args, **kwargs: call(*args, **{k: v for k, v in kwargs.items() if k not in flags})


class Weights(NamedTuple):
    """The weights of a layer, the factors whose product LoRA adds to them (None without), and which are trained."""

    variable: Any
    factors: tuple[Any, Any] | None
    trained: tuple[str, ...]


def weights_of(layer: Any, name: str) -> Weights:
    """The weights that the layer has under this name."""
    if not getattr(layer, "lora_enabled", False) or not hasattr(layer, f"lora_{name}_a"):
        variable = getattr(layer, name)
        # That of an int4 layer is a tensor, unpacked from its variable.
        return Weights(variable, None, ("kernel",) * getattr(variable, "trainable", False))
    # The layer's attribute has the product added.
    variable = next(weights for weights in layer.weights if weights.name == name)
    factors = getattr(layer, f"lora_{name}_a"), getattr(layer, f"lora_{name}_b")
    trained = ("kernel",) * variable.trainable + ("low_rank",) * any(factor.trainable for factor in factors)
    first, second = map(snapshot, factors)
    return Weights(variable, (first * (layer.lora_alpha / layer.lora_rank), second), trained)


def head_of(
    layer: Any, training: Any, trained: tuple[str, ...] = (), *, bias: Any = None, **inputs: Any
) -> provenance.Head:
    """The head of a layer with these `inputs` of its logits, and the bias, a variable.

    `trained` are the names of those that are trained beside hidden states and bias.
    """
    return provenance.Head(
        **inputs,
        bias=None if bias is None else snapshot(bias),
        training=provenance.is_training(training),
        gradients=("hidden", *trained, *["bias"] * (bias is not None and bias.trainable)),
        layer=layer.name,
        chunk_bytes=getattr(layer, "chunk_bytes", None),
    )
