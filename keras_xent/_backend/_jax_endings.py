"""How a program of JAX ends in a tensor, read from the equations that JAX has traced so far.

JAX says nowhere in public what made a tracer. Where its private attributes (`primal`, `parent`; JAX 0.7 and later) are
missing, nothing is known, and what depends on it is only a warning.
"""

from typing import Any

from keras_xent._types import Tensor

# Operations after which logits are logits, and probabilities are probabilities.
_RESHAPES = {"reshape", "squeeze", "expand_dims", "transpose", "slice", "convert_element_type", "broadcast_in_dim"}
_PRODUCTS = {"dot_general", "conv_general_dilated"}
_CALLS = {"jit", "pjit"}


def traced_ending(tensor: Tensor) -> tuple[str, str] | None:
    """The layer (empty if unknown) and the kind of operation ("softmax", "sigmoid", "log_softmax", "linear") that end
    in a traced tensor; None where they are not known.
    """
    equation = _equation(tensor)
    kind = _kind(equation)
    if kind == "linear" and any(_kind(_equation(one)) == "softmax" for one in _factors(equation)):
        # The product of probabilities and a matrix of transitions is one of probabilities again.
        return None
    return None if kind is None else (_layer(equation), kind)


def _equation(tensor: Any) -> Any:
    """The equation that made a tracer, seen through reshapes and casts; None if it is not known."""
    while True:
        while hasattr(tensor, "primal"):
            tensor = tensor.primal
        equation: Any = getattr(tensor, "parent", None)
        if not hasattr(equation, "primitive") or not hasattr(equation, "in_tracers"):
            return None
        if equation.primitive.name not in _RESHAPES:
            return equation
        tensor = equation.in_tracers[0]


def _name(tensor):
    equation = _equation(tensor)
    return "" if equation is None else equation.primitive.name


def _kind(equation):
    name = "" if equation is None else equation.primitive.name
    if name == "logistic":
        return "sigmoid"
    if name == "div" and [*map(_name, equation.in_tracers)] == ["exp", "reduce_sum"]:
        return "softmax"
    if name in _CALLS and equation.params.get("name") == "log_softmax":
        return "log_softmax"
    # A bias that is added to a product, rather than the sum of two probabilities.
    return "linear" if name in _PRODUCTS or (name == "add" and _PRODUCTS & {*map(_name, equation.in_tracers)}) else None


def _factors(equation):
    if equation.primitive.name in _PRODUCTS:
        return equation.in_tracers
    terms = map(_equation, equation.in_tracers)
    return [one for term in terms if term is not None and term.primitive.name in _PRODUCTS for one in term.in_tracers]


def _layer(equation):
    # Keras opens a scope for each layer: "jvp(model)/dense".
    scope = str(getattr(getattr(equation, "source_info", None), "name_stack", ""))
    return scope.split("/")[-1].split("(")[-1].rstrip(")")
