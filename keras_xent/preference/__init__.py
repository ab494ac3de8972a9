"""Losses of preference tuning and policy optimization: pure functions of log-probabilities.

Every argument that ends in `logps` holds sums (or means) over the tokens of a completion, `[B]`, as
`keras_xent.sequence_log_probs` gives them, except in `grpo`, which takes one for each token, `[B, T]`, as
`keras_xent.token_log_probs` gives them. Gradients go to the policy only; 16-bit floats are computed in float32.
`keras_xent.sequence_loss` computes one of these losses from a model, `grpo` excepted, with one matmul less.

REINFORCE needs no function: it is the cross-entropy with the advantages as `sample_weight` or `token_weights`, negative
ones included. `loss = linear_cross_entropy(hidden, kernel, labels, token_weights=advantages, reduction="sum") / tokens`
has the gradient of `-mean(advantage log_prob)`. Avoid `reduction="token_mean"` there: its denominator is the sum of the
weights, which may be 0.
"""

from keras_xent.preference.grpo import grpo
from keras_xent.preference.kto import kto
from keras_xent.preference.pairs import dpo, ipo, orpo, simpo

__all__ = ["dpo", "grpo", "ipo", "kto", "orpo", "simpo"]
