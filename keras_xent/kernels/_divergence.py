"""Divergences between two softmax distributions, row by row, and their gradients for the logits of the second.

With the temperature `T`, `log p` and `log q` are log-softmaxes of logits divided by `T`.
"""

import math
import typing
from dataclasses import dataclass
from typing import Any, NamedTuple

from keras import ops

from keras_xent import arguments
from keras_xent._backend import custom_gradient
from keras_xent._types import DivergenceName, Tensor
from keras_xent.kernels import _softmax_row as row
from keras_xent.kernels._compiled import CompiledKernel, row_kernel
from keras_xent.kernels._dtypes import dtype_of, is_finite, upcast
from keras_xent.kernels._masking import multiply_no_nan, nan_unless, where_or_zero

NAMES: tuple[str, ...] = typing.get_args(DivergenceName)


@dataclass(frozen=True)
class Softmax:
    """Probabilities of logits that are capped, then divided by a temperature."""

    temperature: float
    softcap: float | None

    def normalize(self, logits: Tensor, max_logit: Tensor = None) -> "Normalizer":
        """Returns the numbers by which single logits of these rows become probabilities."""
        max_logit = row.max_of_logits(logits) if max_logit is None else max_logit
        return self.normalizer(max_logit, ops.sum(self._exp_shifted(logits, max_logit), axis=1, keepdims=True))

    def normalizer(self, max_logit: Tensor, sum_exp: Tensor) -> "Normalizer":
        """These numbers, NaN for rows that have no limit: with several logits of +inf, or only -inf."""
        if self.softcap is None:
            # Each of these has counted as a largest logit.
            sum_exp = nan_unless(ops.logical_or(is_finite(max_logit), sum_exp < 1.5), sum_exp)
        return Normalizer(max_logit, sum_exp)

    def log_prob(self, logits: Tensor, normalizer: "Normalizer") -> Tensor:
        """The log-probabilities of these logits."""
        return -(self.below(logits, normalizer.max_logit) + ops.log(normalizer.sum_exp))

    def prob(self, logits: Tensor, normalizer: "Normalizer") -> Tensor:
        """The probabilities of these logits, from the exponentials that `normalize` has summed."""
        return self._exp_shifted(logits, normalizer.max_logit) * (1.0 / normalizer.sum_exp)

    def gradient(self, gradient: Tensor, upstream: Tensor, logits: Tensor) -> Tensor:
        """`upstream` times the gradient for capped, divided logits, as one for the logits."""
        return row.to_logits_dtype(
            upstream / self.temperature * gradient, ops.equal(upstream, 0.0), logits, self.softcap
        )

    def _exp_shifted(self, logits, max_logit):
        return ops.exp(-self.below(logits, max_logit))

    def below(self, logits: Tensor, max_logit: Tensor) -> Tensor:
        """How far these logits, capped and divided, are below the largest of their row."""
        # Divided after the subtraction: divided logits XLA:CPU would write to memory.
        below = row.max_minus_logit(upcast(logits), max_logit, self.softcap)
        return below if self.temperature == 1.0 else below * (1.0 / self.temperature)


class Normalizer(NamedTuple):
    """Two numbers for each row: the largest logit, before cap and division, and the sum of the shifted exponentials."""

    max_logit: Tensor
    sum_exp: Tensor


class Pair(NamedTuple):
    """The teacher's distributions `p` and the student's `q`, their logarithms, and `log p - log q`."""

    log_p: Tensor
    log_q: Tensor
    log_ratio: Tensor
    p: Tensor
    q: Tensor

    @classmethod
    def of(cls, teacher: Tensor, logits: Tensor, softmaxes: Any, normalizers: Any) -> "Pair":
        """The distributions of the teacher's and the student's logits."""
        both = tuple(zip(softmaxes, (teacher, logits), normalizers, strict=True))
        of_teacher, of_student = normalizers
        below_p, below_q = (s.below(x, n.max_logit) for s, x, n in both)
        # Not of the logarithms, which are rounded as numbers of the size of `log C`.
        log_ratio = below_q - below_p + ops.log(of_student.sum_exp / of_teacher.sum_exp)
        log_p, log_q = (s.log_prob(x, n) for s, x, n in both)
        p, q = (s.prob(x, n) for s, x, n in both)
        return cls(log_p, log_q, log_ratio, p, q)


@dataclass(frozen=True)
class Divergence:
    """One of `NAMES`; `beta` is the weight of the teacher in the mixture of Jensen and Shannon."""

    name: str
    beta: float = 0.5

    def __post_init__(self) -> None:
        """Checks the values."""
        if self.name not in NAMES:
            raise ValueError(
                f"`divergence` must be one of {', '.join(map(repr, NAMES))}. Received: divergence={self.name!r}."
            )
        if not 0 < arguments.not_negative("beta", self.beta) < 1:
            raise ValueError(
                f"`beta` must be a number between 0 and 1. Received: beta={self.beta!r}. What GKD calls a beta of 0 is "
                '`divergence="forward_kl"`, and 1 is `"reverse_kl"`.'
            )

    def of_rows(self, rows: Pair) -> tuple[Tensor, Tensor]:
        """The divergence of each row `[n, 1]`, and the mean of the log-ratio under `q`, for the gradient."""
        log_p, log_q, log_ratio, p, q = rows
        if self.name == "forward_kl":
            return _kl(log_ratio, p, q), ops.zeros_like(log_q[:, :1])
        if self.name == "reverse_kl":
            mean = _kl(-log_ratio, q, p)
            return mean, mean
        log_m = self._log_mixture(log_p, log_q)
        m = ops.exp(log_m)
        mean = _kl(log_q - log_m, q, m)
        return self.beta * _kl(log_p - log_m, p, m) + (1.0 - self.beta) * mean, mean

    def gradient(self, rows: Pair, mean: Tensor) -> Tensor:
        """The gradient for the logits of `q`."""
        log_p, log_q, log_ratio, p, q = rows
        if self.name == "forward_kl":
            # Exactly 0 where they agree, also where the compiler rounds only one of the products behind `q - p`.
            return where_or_zero(q - p, ops.not_equal(q, p))
        if self.name == "reverse_kl":
            return _less_mean(q, -log_ratio, mean)
        limit = math.log(1.0 - self.beta)
        return (1.0 - self.beta) * _less_mean(q, self._log_ratio_over(limit, log_p, log_q), mean + limit)

    def _log_ratio_over(self, limit, log_p, log_q):
        """`log (q / m) + limit`: `-log(1 + beta / (1 - beta) p / q)`, 0 where only the student has a class."""
        difference = where_or_zero(log_p - log_q, ops.not_equal(log_p, log_q))
        is_near = ops.abs(difference) < 1.0
        # The mean is `limit` where the two are equal, and so is this.
        near = limit - ops.log1p(self.beta * ops.expm1(ops.where(is_near, difference, 0.0)))
        return ops.where(is_near, near, -ops.softplus(difference + math.log(self.beta) - limit))

    def _log_mixture(self, log_p, log_q):
        # From the larger of the two, so that the mixture of equal ones is equal to them. Not a maximum, which XLA:CPU
        # may take of NaN and a number.
        is_p = log_p > log_q
        larger, smaller = ops.where(is_p, log_p, log_q), ops.where(is_p, log_q, log_p)
        # Where both probabilities are 0 the term is dropped, but -inf - -inf would be NaN.
        apart = where_or_zero(smaller - larger, ops.not_equal(larger, -math.inf))
        change = ops.expm1(apart)
        return larger + ops.log1p(ops.where(is_p, (1.0 - self.beta) * change, self.beta * change))


def _less_mean(q, log_ratio, mean):
    """`q (log_ratio - mean)`, where the mean is that of `log_ratio` under `q`, so that the sum is 0."""
    from_mean = log_ratio - mean
    # Of a row that is sure of a class next to nothing is left here: what the mean has rounded would be more.
    rest = ops.sum(multiply_no_nan(q, from_mean), axis=1, keepdims=True)
    return multiply_no_nan(q, from_mean - rest)


# Coefficients of `(exp(-x) - 1 + x) / x^2` for `|x| < 1`, from the highest power down: of the Chebyshev approximation,
# 1.3e-8 of it off, and of the series, 1e-17.
_EXP_REMAINDER = {
    "float32": (
        -2.8126546e-06,
        2.5358645e-05,
        -0.00019836987,
        0.0013885395,
        -0.0083333453,
        0.041666737,
        -0.16666667,
        0.5,
    ),
    "float64": tuple((-1.0) ** n / math.factorial(n + 2) for n in reversed(range(17))),
}


def _exp_remainder(x):
    """`exp(-x) - 1 + x` for `|x| < 1`, exact to rounding. As a polynomial it takes less time than an exponential."""
    total = 0.0
    for coefficient in _EXP_REMAINDER[dtype_of(x)]:
        total = total * x + coefficient
    return x * x * total


def _kl(difference, p, q):
    """`sum_c p_c (log p_c - log q_c)` of these differences, as the sum of `p (log p - log q) - p + q`.

    No term of that is below 0. Where the distributions are nearly the same, the terms of the other sum cancel, and what
    is left of it is rounding.
    """
    is_near = ops.abs(difference) < 1.0
    near = p * _exp_remainder(ops.where(is_near, difference, 0.0))
    terms = ops.where(is_near, near, q - p + multiply_no_nan(p, difference))
    return ops.sum(ops.where(p > 0, terms, ops.where(ops.isnan(p), p, q)), axis=1, keepdims=True)


@row_kernel(num_outputs=6, is_blocked=lambda rows, **_: True)
def _forward(logits, teacher, *, divergence, softmax):
    normalizers = softmax.normalize(teacher), softmax.normalize(logits)
    loss, mean = divergence.of_rows(Pair.of(teacher, logits, (softmax, softmax), normalizers))
    return softmax.temperature**2 * loss, (*normalizers[0], *normalizers[1], mean)


@CompiledKernel
def _backward(upstream, residuals, logits, teacher, *, divergence, softmax):
    *numbers, mean = residuals
    normalizers = Normalizer(*numbers[:2]), Normalizer(*numbers[2:])
    gradient = divergence.gradient(Pair.of(teacher, logits, (softmax, softmax), normalizers), mean)
    return softmax.gradient(gradient, softmax.temperature**2 * upstream, logits)


# Of student logits `[n, V]` and teacher logits `[n, V]`: the losses `[n, 1]`, with a gradient for the former.
divergence_of_rows = custom_gradient(_forward, _backward)
