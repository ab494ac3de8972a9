"""Formulas of one row of logits whose target is a label: the numbers that a row has one of.

They hold for arrays of any one shape, `[n, 1]` in the kernel and `[n]` in `_fast_steps.py`. With label `k`, smoothing
`s` and class weights `w` the target is `a_k = (1 - s) w_k + s / C w_k`, and `a_c = s / C w_c` for the other classes.
"""

from keras import ops

from keras_xent._types import Tensor
from keras_xent.kernels import _softmax_row as row
from keras_xent.kernels._dtypes import largest
from keras_xent.kernels._logarithms import log1p
from keras_xent.kernels._masking import multiply_no_nan
from keras_xent.kernels._options import SoftmaxOptions


def loss(
    label_logit: Tensor,
    label_weight: Tensor,
    sum_of_losses: Tensor,
    max_logit: Tensor,
    sum_exp_minus_one: Tensor,
    options: SoftmaxOptions,
) -> Tensor:
    """`(1 - s) w_k nll_k + sum_of_losses + z lse^2`, with the focal factor if asked.

    `label_weight` is None without class weights, `sum_of_losses`, `s / C sum_c w_c nll_c`, without smoothing.
    """
    loss = row.nll(label_logit, max_logit, sum_exp_minus_one, options.logit_softcap)
    if options.focal_gamma:
        loss = loss * row.focal(loss, options.focal_gamma)[0]
    if label_weight is not None:
        loss = multiply_no_nan(label_weight, loss)
    if sum_of_losses is not None:
        share = 1.0 - options.label_smoothing
        loss = share * loss + sum_of_losses if share else sum_of_losses
    return row.plus_z_loss(loss, max_logit, sum_exp_minus_one, options)


def mean_of_losses(mean_below_max: Tensor, num_classes: Tensor, max_logit: Tensor, sum_exp_minus_one: Tensor) -> Tensor:
    """`sum_c nll_c / C` of plain losses, of `sum_c (max_logit - x_c) / C`, which is wrong beside a logit of +inf."""
    # All other classes are infinitely far below.
    far = (num_classes - 1.0) * ops.minimum(max_logit, largest(max_logit)) * largest(max_logit)
    distance = ops.where(row.is_positive_infinity(max_logit), far, mean_below_max)
    return distance + log1p(sum_exp_minus_one)


def gradient(
    label_logit: Tensor,
    label_weight: Tensor,
    mean_weight: Tensor,
    num_classes: Tensor,
    max_logit: Tensor,
    sum_exp_minus_one: Tensor,
    options: SoftmaxOptions,
) -> tuple[Tensor, Tensor]:
    """`(at_label, factor)`: what the gradient is made of, each times `sum_exp = 1 + sum_exp_minus_one`.

    That of the label is `at_label`, that of another class `exp_shifted * factor - sum_exp * a_c`, both times `upstream
    / sum_exp`. Not for smoothing with a focal factor.
    """
    # Only the label's own gradient needs care: 1 - p is the sum of the other classes, which is exact where p has
    # rounded to 1.
    smoothing, weight = options.label_smoothing, 1.0 if label_weight is None else label_weight
    target = target_sum = (1.0 - smoothing) * weight
    if smoothing:
        target, target_sum = target + smoothing / num_classes * weight, target_sum + smoothing * mean_weight
    label_shifted = row.exp_shifted(label_logit, max_logit, options.logit_softcap)
    sum_of_others = sum_exp_minus_one + (1.0 - label_shifted)
    if options.focal_gamma:
        nll = row.nll(label_logit, max_logit, sum_exp_minus_one, options.logit_softcap)
        target = target_sum = target_sum * row.focal(nll, options.focal_gamma)[1]
    at_label = -sum_of_others * target_sum
    if smoothing:
        # Of a label that is smoothed away the difference from 1 is all rounding, and p is not.
        sum_exp = 1.0 + sum_exp_minus_one
        likely, unlikely = (target_sum - target) * sum_exp + at_label, label_shifted * target_sum - target * sum_exp
        at_label = ops.where(2.0 * label_shifted < sum_exp, unlikely, likely)
    if not options.z_loss:
        return at_label, target_sum
    # Not as a part of the factor of p, where it would cost the last digits of a confident row's gradient.
    slope = row.z_loss_slope(max_logit, sum_exp_minus_one, options)
    return at_label + slope * label_shifted, target_sum + slope
