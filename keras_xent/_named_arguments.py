"""Constructors whose arguments can be named again: in a configuration, in a `repr`, and in an error."""

import inspect
from typing import Any

from keras_xent import arguments

# What other libraries call an argument, and what it is called here.
_OTHER_NAMES = {
    "ignore_class": ("ignore_index", "padding_idx", "pad_token_id", "ignore_label", "ignore_id", "mask_value"),
    "class_weight": ("weight", "weights", "class_weights"),
    "label_smoothing": ("smoothing", "label_smooth", "smooth_factor"),
    "focal_gamma": ("gamma",),
    "focal_alpha": ("alpha",),
    "pos_weight": ("pos_weights", "positive_weight"),
    "axis": ("dim",),
    "reduction": ("reduce", "size_average"),
    "from_logits": ("logits", "with_logits"),
    "logit_softcap": ("softcap", "logit_soft_cap", "final_logit_softcapping"),
    "z_loss": ("lse_square_scale", "z_loss_weight"),
}


class NamedArguments:
    """Mixin of losses and metrics: `_given_arguments`, `repr`, and sentences about wrong arguments."""

    _given_dtype: str | None

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Refuses, with a sentence, tensors and the argument names of other libraries."""
        if len(args) > 1 and all(getattr(value, "shape", ()) != () for value in args[:2]):
            raise TypeError(
                f"{cls.__name__} is a class, and its arguments are options. Received: tensors. Make an object of it "
                f"first: `{cls.__name__}()`, which takes `y_true` and `y_pred`."
            )
        known = _parameters(cls)
        for name in kwargs:
            right = next((right for right, others in _OTHER_NAMES.items() if name in others), None)
            if name not in known and right in known:
                raise TypeError(f"{cls.__name__} has no argument `{name}`: it is called `{right}` here.")
        new = super().__new__
        return new(cls) if new is object.__new__ else new(cls, *args, **kwargs)

    def _given_arguments(self) -> dict[str, Any]:
        """The constructor's arguments by name, at the values given; `dtype` as it was given, variables as numbers."""
        return {name: arguments.numbers_of(value) for name, value in self._attributes().items()}

    def _attributes(self):
        known = _parameters(type(self))
        given = {name: getattr(self, name) for name in known if hasattr(self, name)}
        return {**given, **({"dtype": self._given_dtype} if "dtype" in known else {})}

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
