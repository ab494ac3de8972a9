"""What the softmax cross-entropies compute of a row of logits.

With logits `x` (after the soft cap), `p = softmax(x)`, `lse = log sum exp x`, smoothed and weighted targets `a_c` and
`A = sum_c a_c`, each of these losses is `sum_c a_c (lse - x_c)` with gradient `A p - a`. Of each row two numbers are
kept: the largest logit `top`, and `excess = sum_c exp(x_c - top) - 1`.

`excess` rather than the sum itself is what keeps confident rows right: with all but 1e-9 of the probability on the
target, the sum rounds to 1 in float32 and its logarithm, the loss, to 0. The 1 is therefore taken off inside the sum,
from the very term it comes from: the target's.

All arrays have the class axis second, and one column where they hold a number per row.
"""

from keras import ops

from keras_xent.kernels import targets
from keras_xent.kernels._rows import row_max, row_sum


def floating(logits):
    logits = targets.to_tensor(logits)
    return logits if targets.is_float(logits) else ops.cast(logits, "float32")


def optional_class_weights(class_weight, num_classes, logits, rank):
    if class_weight is None:
        return ()
    return (targets.class_weights(class_weight, num_classes, targets.accumulator_dtype(logits), rank),)


def selected(loss, valid):
    # Mask last: whatever a masked row holds, NaN included, it is not selected. The backward pass sees an upstream
    # gradient of exactly 0 there and selects in the same way.
    return loss if valid is None else ops.where(valid, loss, ops.zeros_like(loss))


def accurate(logits):
    return ops.cast(logits, targets.accumulator_dtype(logits))


def capped(logits, softcap):
    x = accurate(logits)
    return x if softcap is None else softcap * ops.tanh(x / softcap)


def top(logits, softcap):
    # The cap is monotonic, so the largest capped logit is the cap of the largest.
    top = row_max(accurate, logits)
    return top if softcap is None else softcap * ops.tanh(top / softcap)


def finite(top):
    # With a logit of +inf, all others are infinitely far below: exp(x - largest number) is 0 for them.
    return ops.minimum(top, targets.largest(top))


def infinite_logits(logits, top):
    """How many logits of each row are +inf. Costs nothing where there are none."""
    infinite = ops.equal(top, float("inf"))
    return ops.cond(
        ops.any(infinite),
        lambda: ops.sum(ops.cast(ops.equal(accurate(logits), float("inf")), top.dtype), axis=1, keepdims=True),
        lambda: ops.zeros_like(top),
    )


def with_infinities(excess, logits, top, softcap):
    # One logit of +inf has all the probability. Two have no limit, nor has a row of only -inf: NaN.
    if softcap is not None:
        return excess
    infinite = infinite_logits(logits, top)
    excess = ops.where(infinite == 1, ops.zeros_like(excess), excess)
    return ops.where(infinite > 1, ops.full_like(excess, float("nan")), excess)


def gap(x, top):
    # top - x, and 0 for the top itself even where it is infinite.
    return ops.where(ops.equal(x, top), ops.zeros_like(x), top - x)


def focal(nll, gamma):
    """The focal factor `u^gamma` of a class, and the slope that the gradient has in place of 1.

    With `u = 1 - p` and `p = exp(-nll)`, the slope is `u^gamma (1 + gamma p nll / u)`. The quotient `nll / u` tends to
    1 where `u` tends to 0, which is where computing `u^(gamma - 1)` gives NaN for gamma < 1.
    """
    p = ops.exp(-nll)
    u = ops.maximum(-ops.expm1(-nll), 0.0)
    ratio = ops.where(u > 0, nll / ops.where(u > 0, u, 1.0), 1.0)
    factor = u**gamma
    return factor, factor * (1.0 + gamma * ops.where(p > 0, p * ratio, 0.0))


def sum_of_losses(weight, total, logits, arrays, top, excess, *, gamma, softcap):
    """`sum_c a_c nll_c`, focal if asked; `weight(logits, *arrays)` gives `a_c` and `total` its sum over the row."""
    common = ops.log1p(excess)

    def term(logits, *arrays):
        a = weight(logits, *arrays)
        loss = gap(capped(logits, softcap), top)
        if gamma:
            loss = loss + common
            loss = loss * focal(loss, gamma)[0]
        # 0 times an infinite loss is 0.
        return ops.where(ops.equal(a, 0.0), ops.zeros_like(loss), a * loss)

    loss = row_sum(term, logits, *arrays)
    return loss if gamma else loss + ops.where(ops.equal(total, 0.0), ops.zeros_like(loss), total * common)


def plus_z_loss(loss, top, excess, z_loss):
    return loss + z_loss * ops.square(top + ops.log1p(excess)) if z_loss else loss


def gradient(upstream, logits, a, total, top, excess, *, gamma, z_loss, softcap):
    """`upstream (B p - a)`, with `B = A + 2 z lse`. `a` has the shape of the logits, is fused, and never in memory."""
    x = capped(logits, softcap)
    common = ops.log1p(excess)
    if gamma:
        a = a * focal(gap(x, top) + common, gamma)[1]
        total = ops.sum(a, axis=1, keepdims=True)
    slope = total + 2.0 * z_loss * (top + common) if z_loss else total
    share = slope / (1.0 + excess)
    # p of the top is 1 - excess / (1 + excess); a is taken off before anything passes through a p rounded to 1.
    at_top = (total - a) + (slope - total) - excess * share
    elsewhere = ops.exp(ops.minimum(x - finite(top), 0.0)) * share - a
    gradient = upstream * ops.where(ops.equal(x, top), at_top, elsewhere)
    return finished(gradient, upstream, x, logits, softcap)


def finished(gradient, upstream, x, logits, softcap):
    if softcap is not None:
        gradient = gradient * (1.0 - ops.square(x / softcap))
    # Rows that nobody asked for are selected away, so that NaN in them goes nowhere.
    gradient = ops.where(ops.equal(upstream, 0.0), ops.zeros_like(gradient), gradient)
    return ops.cast(gradient, logits.dtype)


def number_of_classes(logits):
    # A float, so that it can be a divisor where the number is not known before the program runs.
    return ops.cast(ops.shape(logits)[1], targets.accumulator_dtype(logits))


def classes(logits, dtype="int32"):
    return ops.reshape(ops.arange(ops.shape(logits)[1], dtype=dtype), (1, -1) + (1,) * (len(logits.shape) - 2))


def times(weight, loss):
    return ops.where(ops.equal(weight, 0.0), ops.zeros_like(loss), weight * loss)
