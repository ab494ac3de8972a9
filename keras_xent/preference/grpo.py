"""Group relative policy optimization."""

import math

from keras import ops

from keras_xent import arguments
from keras_xent._backend import no_autograph
from keras_xent._named_arguments import named_arguments
from keras_xent._types import Reduction, Tensor
from keras_xent.kernels import reduction as _reduction
from keras_xent.kernels._dtypes import to_tensor
from keras_xent.kernels._masking import where_or_zero
from keras_xent.kernels._shapes import align_weights
from keras_xent.preference._log_probs import aligned, check_shape, checked


@no_autograph
@named_arguments
def grpo(
    policy_logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    *,
    mask: Tensor = None,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    reference_logps: Tensor = None,
    beta: float | None = None,
    reduction: Reduction | None = "sequence_mean",
) -> Tensor:
    """Group relative policy optimization: the clipped objective of PPO, with advantages that need no value model.

    Advantages are the rewards of several completions of one prompt, less their mean (and divided by their deviation).

    Formula of a token, with `r = exp(policy - old)` and `d = reference - policy`:
    `-min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A) + beta (exp(d) - d - 1)`. Both differences are clipped to
    [-20, 20], as verl does: the loss and its gradient are finite, and 0 is the gradient beyond.

    Args:
        policy_logps: `[B, T]`, of each token of the completions, by the model that is trained. `[B]` are those of whole
            completions: with means over tokens, `sequence_log_probs(..., normalize=True)`, the loss is that of GSPO.
        old_logps: the same, by the model that wrote them; `ops.stop_gradient(policy_logps)` for one update a batch.
        advantages: `[B]`, or `[B, T]`.
        mask: booleans of that shape: the tokens of the completions. False entries may hold NaN.
        epsilon, epsilon_high: the clip range below and above 1; above it is that below unless it is given. Infinity
            does not clip.
        reference_logps: the same, of the model that training started from, for `beta` above 0.
        beta: weight of the divergence from the reference; None: 0.
        reduction: `"sequence_mean"`, the mean over completions of each one's token mean, as in the paper, without
            completions that have no token; `"token_mean"` as in DAPO; `"sum"`, to be divided by a constant in
            Dr. GRPO; or `"none"`, which returns a loss for each log-probability.

    Returns:
        The loss, a scalar, or of the shape of `policy_logps`.

    Raises:
        ValueError: shapes that differ; `beta` without `reference_logps`; an argument out of its range.

    Warns:
        UserWarning: `reference_logps` without `beta`.

    Example:

    >>> import math
    >>> import keras_xent as kx
    >>> loss = kx.preference.grpo([[math.log(0.6)], [math.log(0.6)]], [[math.log(0.4)]] * 2, [1.0, -1.0])
    >>> round(float(loss), 4)  # (-min(1.5, 1.2) + max(1.5, 1.2)) / 2
    0.15

    References: arXiv:2402.03300, equation (3); clip range of two sides and token mean, arXiv:2503.14476 (DAPO); a
    constant divisor, arXiv:2503.20783 (Dr. GRPO); ratios of completions, arXiv:2507.18071 (GSPO).
    """
    _reduction.checked_reduction(reduction)
    if beta is None:
        beta = 0.0
        if reference_logps is not None:
            arguments.warn(
                "`reference_logps` have no effect without `beta`: grpo leaves the divergence from the reference out. "
                "Give its weight, for instance beta=0.04, or say beta=0.0."
            )
    if arguments.not_negative("beta", beta) and reference_logps is None:
        raise ValueError(f"`reference_logps` must be given where `beta` is not 0. Received: beta={beta!r}.")
    given = {"policy_logps": policy_logps, "old_logps": old_logps}
    policy, old, *reference = aligned(**given, **({"reference_logps": reference_logps} if beta else {}))
    valid = None
    if mask is not None:
        valid = ops.cast(to_tensor(checked("mask", mask)), "bool")
        check_shape("mask", valid, policy)
    # Selected before the exponential, whose derivative would turn 0 into NaN.
    policy, old = where_or_zero(policy, valid), where_or_zero(ops.stop_gradient(old), valid)
    advantages = ops.cast(to_tensor(checked("advantages", advantages)), policy.dtype)
    advantages = align_weights(ops.stop_gradient(advantages), policy.shape, "advantages")
    low, high = _clip_range(epsilon, epsilon if epsilon_high is None else epsilon_high)
    ratio = ops.exp(_clipped(policy - old))
    gain, clipped_gain = ratio * advantages, ops.stop_gradient(ops.clip(ratio, low, high)) * advantages
    # Not a minimum, whose gradient JAX divides among two that are equal.
    losses = -ops.where(gain <= clipped_gain, gain, clipped_gain)
    if beta:
        difference = _clipped(where_or_zero(ops.stop_gradient(reference[0]), valid) - policy)
        losses = losses + beta * (ops.expm1(difference) - difference)
    return _reduction.reduce(where_or_zero(losses, valid), reduction=reduction, valid=valid)


def _clip_range(below, above):
    # inf, which is no clipping, is a fair number here.
    for name, epsilon in (("epsilon", below), ("epsilon_high", above)):
        if epsilon != math.inf:
            arguments.not_negative(name, epsilon)
    return 1.0 - below, 1.0 + above


def _clipped(log_ratio):
    # The exponential of more would be infinite, and its product with a derivative of 0 NaN.
    return ops.clip(log_ratio, -20.0, 20.0)
