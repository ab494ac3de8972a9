"""Losses of pairs: one completion was preferred to another."""

from keras import ops

from keras_xent import arguments
from keras_xent._backend import no_autograph
from keras_xent._named_arguments import named_arguments
from keras_xent._types import Tensor
from keras_xent.preference._log_probs import of_sequences


@no_autograph
@named_arguments
def dpo(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Direct preference optimization: the policy learns which of two completions is preferred, without a reward model.

    Formula, with `h = (policy_chosen - policy_rejected) - (reference_chosen - reference_rejected)` and smoothing `s`:
    `-(1 - s) log sigmoid(beta h) - s log sigmoid(-beta h)`.

    Args:
        policy_chosen_logps, policy_rejected_logps: `[B]`, of the model that is trained, summed over the tokens.
        reference_chosen_logps, reference_rejected_logps: `[B]`, of the model that training started from.
        beta: how strongly the policy is kept near the reference.
        label_smoothing: the probability that a pair is labeled the wrong way round (conservative DPO).

    Returns:
        Losses `[B]`, float32 (float64 for float64).

    Raises:
        ValueError: shapes that differ; an argument out of its range.

    Example:

    >>> import numpy as np
    >>> import keras_xent as kx
    >>> loss = kx.preference.dpo([-2.0], [-5.0], [-3.0], [-3.0], beta=1.0)
    >>> round(float(loss[0]), 4)  # -ln sigmoid(3)
    0.0486

    References: arXiv:2305.18290, equation (7); smoothing, "A note on DPO with noisy preferences" (E. Mitchell, 2023).
    """
    margin = _margin(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps)
    return _logistic(arguments.above_zero("beta", beta) * margin, label_smoothing)


@no_autograph
@named_arguments
def ipo(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
) -> Tensor:
    """Identity preference optimization: the margin between two completions is trained towards a finite value.

    For preferences so clear that the margin of `dpo` would grow without limit.

    Formula, with `h = (policy_chosen - policy_rejected) - (reference_chosen - reference_rejected)`:
    `(h - 1 / (2 beta))^2`.

    Args:
        policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps: `[B]`. Means over
            the tokens (`sequence_log_probs(..., normalize=True)`) keep long completions from dominating.
        beta: the margin that the policy should reach is `1 / (2 beta)`.

    Returns:
        Losses `[B]`.

    Raises:
        ValueError: shapes that differ; an argument out of its range.

    Example:

    >>> import keras_xent as kx
    >>> float(kx.preference.ipo([-2.0], [-5.0], [-3.0], [-3.0], beta=0.25)[0])  # (3 - 2)^2
    1.0

    References: arXiv:2310.12036, equation (17).
    """
    margin = _margin(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps)
    return ops.square(margin - 0.5 / arguments.above_zero("beta", beta))


@no_autograph
@named_arguments
def simpo(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    *,
    beta: float = 2.0,
    gamma: float = 0.5,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Simple preference optimization: no reference model, and a margin that the preferred completion has to win by.

    Formula, with smoothing 0: `-log sigmoid(beta (chosen - rejected) - gamma)`.

    Args:
        policy_chosen_logps, policy_rejected_logps: `[B]`, means over the tokens
            (`sequence_log_probs(..., normalize=True)`).
        beta: scale of the difference.
        gamma: the margin.
        label_smoothing: the probability that a pair is labeled the wrong way round.

    Returns:
        Losses `[B]`.

    Raises:
        ValueError: shapes that differ; an argument out of its range.

    Example:

    >>> import keras_xent as kx
    >>> round(float(kx.preference.simpo([-1.0], [-2.0], beta=2.0, gamma=2.0)[0]), 4)  # -ln sigmoid(0)
    0.6931

    References: arXiv:2405.14734, equation (6).
    """
    chosen, rejected = of_sequences(
        policy_chosen_logps=policy_chosen_logps, policy_rejected_logps=policy_rejected_logps
    )
    margin = arguments.above_zero("beta", beta) * (chosen - rejected) - arguments.not_negative("gamma", gamma)
    return _logistic(margin, label_smoothing)


@no_autograph
@named_arguments
def orpo(policy_chosen_logps: Tensor, policy_rejected_logps: Tensor, *, beta: float = 0.1) -> Tensor:
    """Odds ratio preference optimization: supervised tuning and preference in one loss, without a reference model.

    Formula, with mean log-probabilities `c` and `r`, `odds(l) = l - log(1 - exp(l))`:
    `-c - beta log sigmoid(odds(c) - odds(r))`.

    Args:
        policy_chosen_logps, policy_rejected_logps: `[B]`, means over the tokens
            (`sequence_log_probs(..., normalize=True)`), below 0. Those above -1e-30 count as that: the odds are finite.
        beta: weight of the preference (`lambda` in the paper).

    Returns:
        Losses `[B]`.

    Raises:
        ValueError: shapes that differ; an argument out of its range.

    Example:

    >>> import math
    >>> import keras_xent as kx
    >>> loss = kx.preference.orpo([math.log(0.5)], [math.log(0.25)], beta=1.0)
    >>> round(float(loss[0]), 4)  # ln 2 - ln sigmoid(ln 3)
    0.9808

    References: arXiv:2403.07691, equations (6) and (7).
    """
    chosen, rejected = of_sequences(
        policy_chosen_logps=policy_chosen_logps, policy_rejected_logps=policy_rejected_logps
    )
    log_odds_ratio = _log_odds(chosen) - _log_odds(rejected)
    return -chosen - arguments.not_negative("beta", beta) * ops.log_sigmoid(log_odds_ratio)


def _margin(policy_chosen, policy_rejected, reference_chosen, reference_rejected):
    chosen, rejected, *reference = of_sequences(
        policy_chosen_logps=policy_chosen,
        policy_rejected_logps=policy_rejected,
        reference_chosen_logps=reference_chosen,
        reference_rejected_logps=reference_rejected,
    )
    reference_chosen, reference_rejected = map(ops.stop_gradient, reference)
    return (chosen - rejected) - (reference_chosen - reference_rejected)


def _logistic(margin, smoothing):
    smoothing = arguments.fraction("label_smoothing", smoothing)
    loss = -ops.log_sigmoid(margin)
    return loss if not smoothing else (1.0 - smoothing) * loss - smoothing * ops.log_sigmoid(-margin)


def _log_odds(log_prob):
    # At probability 1 the odds are infinite. Any number in between counts: small as 1 - p is, so is the gradient of the
    # log-probability for the logits, and the product of the two is that of the odds.
    log_prob = ops.minimum(log_prob, -1e-30)
    is_likely = log_prob > -0.6931472
    likely = ops.log(-ops.expm1(ops.where(is_likely, log_prob, -1.0)))
    unlikely = ops.log1p(-ops.exp(ops.where(is_likely, -1.0, log_prob)))
    return log_prob - ops.where(is_likely, likely, unlikely)
