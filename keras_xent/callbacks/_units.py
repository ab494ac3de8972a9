"""Nats, bits and perplexity: the one place that converts between them and that names them in logs."""

import math

import numpy as np

_LARGEST_NLL = math.log(np.finfo("float64").max)


def to_perplexity(nll: float) -> float:
    """The perplexity of a mean cross-entropy in nats; inf where float64 cannot hold it."""
    if math.isnan(nll):
        return nll
    return math.exp(nll) if nll < _LARGEST_NLL else math.inf


def to_nats(perplexity: float) -> float:
    """The mean cross-entropy in nats of a perplexity; nan where there is none."""
    return math.log(perplexity) if perplexity > 0 else math.nan


def to_bits(nll: float) -> float:
    """Nats as bits."""
    return nll / math.log(2)


def sibling_tag(name: str, unit: str) -> str:
    """`"nll"` for `"perplexity"`, `"decoder_nll"` for `"decoder_perplexity"`, `"ppl_nll"` for `"ppl"`."""
    stem = name.removesuffix("perplexity")
    return f"{stem}{unit}" if stem != name else f"{name}_{unit}"


def units_of(name: str, nll: float) -> dict[str, float]:
    """A mean cross-entropy in all units, under the names that go with the name of the perplexity."""
    return {
        name: to_perplexity(nll),
        sibling_tag(name, "nll"): nll,
        sibling_tag(name, "bits_per_token"): to_bits(nll),
    }
