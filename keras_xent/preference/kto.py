"""Kahneman-Tversky optimization."""

from keras import ops

from keras_xent import arguments
from keras_xent._backend import no_autograph
from keras_xent._named_arguments import named_arguments
from keras_xent._types import Tensor
from keras_xent.kernels._dtypes import to_tensor
from keras_xent.preference._log_probs import check_shape, checked, of_sequences


@no_autograph
@named_arguments
def kto(
    policy_logps: Tensor,
    reference_logps: Tensor,
    is_desirable: Tensor,
    *,
    kl: Tensor = 0.0,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Kahneman-Tversky optimization: completions are judged one by one, good or bad, instead of in pairs.

    Formula, with `h = policy - reference` and the reference point `z = max(0, mean(kl))`:
    `weight (1 - sigmoid(beta (h - z)))` for a desirable completion, `weight (1 - sigmoid(beta (z - h)))` for another.

    Args:
        policy_logps, reference_logps: `[B]`, summed over the tokens.
        is_desirable: booleans `[B]`, or numbers: above 0 is desirable.
        kl: the divergence of the policy from the reference: a number, or the differences `policy - reference` of
            completions that belong to other prompts of the batch (of none, 0). A constant to the gradient.
        beta: how strongly the policy is kept near the reference.
        desirable_weight, undesirable_weight: weights of the two kinds, for data with few of one.

    Returns:
        Losses `[B]`.

    Raises:
        ValueError: shapes that differ; an argument out of its range.

    Example:

    >>> import keras_xent as kx
    >>> loss = kx.preference.kto([-2.0, -2.0], [-3.0, -3.0], [True, False], beta=1.0)
    >>> [round(float(x), 4) for x in loss]  # 1 - sigmoid(1) and 1 - sigmoid(-1)
    [0.2689, 0.7311]

    References: arXiv:2402.01306, equation (8).
    """
    policy, reference = of_sequences(policy_logps=policy_logps, reference_logps=reference_logps)
    # Labels may be 0 and 1, or -1 and 1.
    desirable = ops.cast(to_tensor(checked("is_desirable", is_desirable)), policy.dtype) > 0
    check_shape("is_desirable", desirable, policy)
    ratio = policy - ops.stop_gradient(reference)
    kl = ops.cast(to_tensor(checked("kl", kl)), ratio.dtype)
    # Of none the mean would be NaN.
    mean_kl = ops.sum(kl) / ops.maximum(ops.cast(ops.size(kl), kl.dtype), 1.0)
    point = ops.stop_gradient(ops.maximum(mean_kl, 0.0))
    distance = arguments.above_zero("beta", beta) * (ratio - point)
    good = arguments.not_negative("desirable_weight", desirable_weight)
    bad = arguments.not_negative("undesirable_weight", undesirable_weight)
    return ops.where(desirable, good * _sigmoid(-distance), bad * _sigmoid(distance))


def _sigmoid(x):
    # Both backends differentiate one as s (1 - s), of which nothing is left where s rounds to 1.
    return ops.where(x > 0, 1.0 - ops.sigmoid(-x), ops.sigmoid(x))
