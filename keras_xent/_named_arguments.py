"""Arguments known by name: constructors that name theirs again, and sentences about those of other libraries."""

import difflib
import functools
import inspect
from collections.abc import Collection
from typing import Any

import keras

from keras_xent import arguments
from keras_xent._types import Function

# What other libraries call an argument, and what it is called here: the first one that there is.
_OTHER_NAMES = {
    "ignore_class": (
        "ignore_index",
        "padding_idx",
        "pad_token_id",
        "mask_token_id",
        "ignore_label",
        "ignore_id",
        "mask_value",
    ),
    "class_weight": ("weight", "weights", "class_weights", "ce_weight"),
    "token_weights": ("sample_weight", "sample_weights", "weights"),
    "label_smoothing": ("smoothing", "label_smooth", "smooth_factor", "label_smoothing_factor"),
    "focal_gamma": ("gamma",),
    "focal_alpha": ("alpha",),
    "pos_weight": ("pos_weights", "positive_weight"),
    "axis": ("dim",),
    "reduction": ("reduce", "size_average"),
    "from_logits": ("logits", "with_logits"),
    "logit_softcap": ("softcap", "logit_soft_cap", "final_logit_softcapping"),
    "z_loss": ("lse_square_scale", "z_loss_weight", "z_loss_multiplier"),
    "temperature": ("T", "tau"),
    "bins": ("n_bins", "num_bins"),
    "normalize": ("average_log_prob",),
    "policy_logps": ("per_token_logps",),
    "old_logps": ("old_per_token_logps",),
    "reference_logps": ("ref_logps", "ref_per_token_logps"),
    "reference_chosen_logps": ("ref_chosen_logps",),
    "reference_rejected_logps": ("ref_rejected_logps",),
    "epsilon": ("epsilon_low", "clip_ratio", "clip_ratio_low"),
    "epsilon_high": ("clip_ratio_high",),
    "gamma": ("simpo_gamma",),
    "divergence": ("loss",),
    "labels": ("target", "targets", "y_true", "y"),
    "targets": ("target", "labels", "y_true", "y"),
    "logits": ("input", "predictions", "y_pred"),
    "y_true": ("target", "targets", "labels"),
    "y_pred": ("input", "predictions", "output"),
    "kernel": ("weight", "weights"),
    "hidden": ("input", "inputs", "x", "hidden_states", "embeddings", "e"),
}
# What to do instead of arguments that have no counterpart. Names of other libraries are looked up first.
_INSTEAD = {
    "ignore_class": "A row of zeros in the targets has no loss; or give `sample_weight` 0.",
    "class_weight": "Give `pos_weight` to a loss of binary labels, or `sample_weight` where the loss is called.",
    "pos_weight": "It belongs to the losses of binary labels; for weights of classes give `class_weight`.",
    "num_classes": "The number of classes is the size of the class axis of `y_pred`.",
    "vocab_size": "The number of classes is the size of the class axis of `y_pred`.",
    "gamma_beta_ratio": "`gamma` is `beta` times it.",
    "loss_type": "Each loss of `keras_xent.preference` is a function of its own; `reduction` is the mean of `grpo`.",
    "norm": "Other norms than the mean follow from what `reliability()` returns.",
    "shift": "Give labels without the first token, and hidden states without the last.",
    "temperature": "Divide the logits by it, or scale the hidden states before the output layer.",
    "sample_weight": "Give it where the loss is called, or to `fit`.",
    "mask": "A Keras mask is found on `y_pred`; or give `sample_weight` 0, or `ignore_class`, where there is one.",
}


def unknown_argument(owner: str, name: str, known: Collection[str]) -> TypeError:
    """The error for an argument that `owner`, which has the arguments `known`, does not have."""
    translated = [right for right, others in _OTHER_NAMES.items() if name in others]
    right = next((one for one in translated if one in known), None)
    if right is not None:
        return TypeError(f"{owner} has no argument `{name}`: it is called `{right}` here.")
    instead = next((_INSTEAD[one] for one in (name, *translated) if one in _INSTEAD), None)
    if instead is None:
        close = difflib.get_close_matches(name, known, n=1)
        instead = f"Did you mean `{close[0]}`?" if close else f"It has: {', '.join(known)}."
    return TypeError(f"{owner} has no argument `{name}`. {instead}")


def serializable(function: Function) -> Function:
    """Keras' decorator, but with a type: a type checker then knows the arguments of the function."""
    register = keras.saving.register_keras_serializable(package="keras_xent")
    # Files of the older HDF5 format have the name of what a decorator wraps.
    register(inspect.unwrap(function))
    return register(function)


def named_arguments(function: Function) -> Function:
    """Decorator for public functions: an argument that a function does not have gets a sentence."""
    known = inspect.signature(function).parameters

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        for name in kwargs:
            if name not in known:
                raise unknown_argument(f"{function.__name__}()", name, known)
        return function(*args, **kwargs)

    return checked  # type: ignore[return-value]


class NamedArguments:
    """Mixin of losses and metrics: configuration, `repr`, sentences about wrong arguments, warnings given once."""

    _given_dtype: str | None
    _warned: set[str]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Refuses, with a sentence, tensors and arguments that the class does not have."""
        if len(args) > 1 and all(getattr(value, "shape", ()) != () for value in args[:2]):
            raise TypeError(
                f"{cls.__name__} is a class, and its arguments are options. Received: tensors. Make an object of it "
                f"first: `{cls.__name__}()`, which takes `y_true` and `y_pred`."
            )
        known = _parameters(cls)
        # What a constructor takes as **kwargs it may keep for itself.
        own = inspect.signature(cls.__init__).parameters.values()
        for name in kwargs if all(p.kind is not p.VAR_KEYWORD for p in own) else ():
            if name not in known:
                raise unknown_argument(cls.__name__, name, known)
        new = super().__new__
        return new(cls) if new is object.__new__ else new(cls, *args, **kwargs)

    def get_config(self) -> dict[str, Any]:
        """Every argument of the constructor, at the value given; variables as numbers."""
        return {name: arguments.numbers_of(value) for name, value in self._attributes().items()}

    def _attributes(self):
        known = _parameters(type(self))
        given = {name: getattr(self, name) for name in known if hasattr(self, name)}
        return {**given, **({"dtype": self._given_dtype} if "dtype" in known else {})}

    def _warn_once(self, about: str, message: str | None) -> None:
        """Warns, if there is a message and none about this was given before."""
        if message is not None and about not in self._warned:
            self._warned.add(about)
            arguments.warn(message)

    def __repr__(self) -> str:
        """The class with its arguments, those left at their defaults left out."""
        defaults = {name: parameter.default for name, parameter in _parameters(type(self)).items()}
        defaults["name"] = getattr(self, "_default_name", defaults.get("name"))
        # Numbers of a variable cannot be read inside a program.
        shown = [
            f"{name}=a variable {tuple(value.shape)}" if arguments.is_variable(value) else f"{name}={value!r}"
            for name, value in self._attributes().items()
            if arguments.is_variable(value) or name in ("from_logits", "reduction") or value != defaults[name]
        ]
        return f"{type(self).__name__}({', '.join(shown)})"


def _parameters(cls: type) -> dict[str, inspect.Parameter]:
    """The parameters of a constructor by name; those that it passes on as **kwargs too."""
    found: dict[str, inspect.Parameter] = {}
    for one in cls.__mro__:
        if "__init__" not in vars(one):
            continue
        parameters = list(inspect.signature(one.__init__).parameters.values())[1:]  # type: ignore[misc]
        named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        found.update({p.name: p for p in named if p.name not in found})
        if all(p.kind is not p.VAR_KEYWORD for p in parameters):
            break
    return found
