"""What the softmax cross-entropies compute of a row of logits.

With logits `x` (after the soft cap), `p = softmax(x)`, `lse = log sum exp x`, smoothed and weighted targets `a_c` and
`A = sum_c a_c`, each of these losses is `sum_c a_c (lse - x_c)` with gradient `A p - a`. Of each row two numbers are
kept: the largest logit `top`, before the cap, and `excess = sum_c exp(x_c - top) - 1`.

`excess` rather than the sum itself is what keeps confident rows right: with all but 1e-9 of the probability on the
target, the sum rounds to 1 in float32 and its logarithm, the loss, to 0. The 1 is therefore taken off inside the sum,
from the very term it comes from: the target's. The top is known by its logit, not by the capped one: compiled at two
places, the same tanh may differ in its last bit, and the loss would be off by as much.

All arrays have the class axis second, and one column where they hold a number per row.
"""

from keras import ops

from keras_xent.kernels import targets
from keras_xent.kernels._rows import rounded, row_max, row_sum, selected, times


def floating(logits):
    logits = targets.to_tensor(logits)
    return logits if targets.is_float(logits) else ops.cast(logits, "float32")


def optional_class_weights(class_weight, num_classes, logits, rank):
    if class_weight is None:
        return ()
    return (targets.class_weights(class_weight, num_classes, targets.accumulator_dtype(logits), rank),)


def accurate(logits):
    return ops.cast(logits, targets.accumulator_dtype(logits))


def capped(logits, softcap):
    x = accurate(logits)
    return x if softcap is None else softcap * ops.tanh(x / softcap)


def top(logits):
    # No result depends on what is taken off all logits, so that it is a constant to every derivative. The maximum's own
    # would be divided among logits that are equally large.
    return ops.stop_gradient(row_max(accurate, logits))


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
    # So far the excess is NaN only where a logit is, which an infinite one must not hide.
    excess = ops.where(ops.logical_and(infinite == 1, ops.logical_not(ops.isnan(excess))), 0.0, excess)
    return ops.where(infinite > 1, ops.full_like(excess, float("nan")), excess)


def gap(x, top, softcap):
    """How far the logits `x` are below the top, both capped here; 0 for the top itself, even an infinite one."""
    apart = capped(top, softcap) - capped(x, softcap)
    if softcap is None:
        return selected(apart, ops.logical_or(ops.not_equal(x, top), ops.isfinite(top)))
    return ops.where(ops.equal(x, top), apart - ops.stop_gradient(apart), apart)


def below(x, top, softcap):
    """`x - top`, both capped here: exactly 0 for the top itself, if it is finite, and never above 0 with a cap."""
    if softcap is None:
        return x - finite(top)
    apart = -gap(x, top, softcap)
    # Not a minimum, here and below: of equals, JAX divides the derivative, and of NaN and a number XLA:CPU may take
    # the number.
    return selected(apart, ops.logical_not(apart > 0))


def mass(logits, top, softcap):
    """`exp(x - top)`; infinite for a logit of +inf."""
    return ops.exp(below(accurate(logits), top, softcap))


def at_most_1(mass):
    return ops.where(mass > 1.0, ops.ones((), mass.dtype), mass)


def nll(x, top, excess, softcap):
    """`lse - x` for some logits of each row."""
    return gap(accurate(x), top, softcap) + ops.log1p(excess)


def focal(nll, gamma):
    """The focal factor `u^gamma` of a class, and the slope that the gradient has in place of 1.

    With `u = 1 - p` and `p = exp(-nll)`, the slope is `u^gamma (1 + gamma p nll / u)`. The quotient `nll / u` tends to
    1 where `u` tends to 0, which is where computing `u^(gamma - 1)` gives NaN for gamma < 1.
    """
    p = ops.exp(-nll)
    u = ops.maximum(-ops.expm1(-nll), 0.0)
    # The power of 0 is not taken: its derivative is infinite for gamma < 1.
    some = u > 0
    one = ops.ones((), u.dtype)
    safe = ops.where(some, u, one)
    ratio = ops.where(some, nll / safe, one)
    factor = ops.where(some, safe**gamma, u)
    return factor, factor * (1.0 + gamma * ops.where(p > 0, p * ratio, 0.0))


def sum_of_losses(weight, total, logits, arrays, top, excess, *, gamma, softcap):
    """`sum_c a_c nll_c`, focal if asked; `weight(*arrays)` gives `a_c` and `total` its sum over the row."""
    common = ops.log1p(excess)

    def term(logits, *arrays):
        a = weight(*arrays)
        loss = gap(accurate(logits), top, softcap)
        if gamma:
            loss = loss + common
            loss = loss * focal(loss, gamma)[0]
        return times(a, loss)

    loss = row_sum(term, logits, *arrays)
    return loss if gamma else loss + times(total, common)


def plus_z_loss(loss, top, excess, z_loss, softcap):
    return loss + z_loss * ops.square(capped(top, softcap) + ops.log1p(excess)) if z_loss else loss


def gradient(upstream, unasked, logits, a, total, top, excess, *, gamma, z_loss, softcap):
    """`upstream (B p - a)`, with `B = A + 2 z lse`. `a` has the shape of the logits, is fused, and never in memory."""
    x = accurate(logits)
    common = ops.log1p(excess)
    if gamma:
        a = a * focal(gap(x, top, softcap) + common, gamma)[1]
        total = ops.sum(a, axis=1, keepdims=True)
    slope = total + 2.0 * z_loss * (capped(top, softcap) + common) if z_loss else total
    share = slope / (1.0 + excess)
    # p of the top is 1 - excess / (1 + excess); a is taken off before anything passes through a p rounded to 1.
    # The mass of the top is 1, and has the derivative.
    masses = at_most_1(mass(logits, top, softcap))
    at_top = (total - a) + (slope - total) + ((masses - 1.0) - excess) * share
    elsewhere = masses * share - a
    return finished(upstream * ops.where(ops.equal(x, top), at_top, elsewhere), unasked, logits, softcap)


def finished(gradient, unasked, logits, softcap):
    # Selected before it is rounded: XLA:CPU selects 16-bit floats by way of float32, and would round them twice.
    (gradient,) = without(unasked, gradient)
    if softcap is not None:
        # The cap's slope 1 - tanh^2, without the difference that is all rounding where the cap is reached.
        small = ops.exp(-2.0 * ops.abs(accurate(logits) / softcap))
        gradient = gradient * (4.0 * small / ops.square(1.0 + small))
    return rounded(gradient, logits.dtype)


def unasked(upstream, top, excess):
    """True for rows without a gradient (NaN, no class) that nobody asked for: they do not count, and leave no trace.

    Other rows are not selected by their upstream gradient of 0: the derivative for that one is their gradient.
    """
    return ops.logical_and(ops.equal(upstream, 0.0), ops.logical_not(ops.isfinite(top + excess)))


def without(rows, *arrays):
    """The arrays, 0 in these rows; what is computed from them there, derivatives included, is a number."""
    return tuple(selected(array, ops.logical_not(rows)) for array in arrays)


def number_of_classes(logits):
    # A float, so that it can be a divisor where the number is not known before the program runs.
    return ops.cast(ops.shape(logits)[1], targets.accumulator_dtype(logits))


def classes(logits, dtype="int32"):
    return ops.reshape(ops.arange(ops.shape(logits)[1], dtype=dtype), (1, -1) + (1,) * (len(logits.shape) - 2))


def rank(logits, labels):
    """How many classes are predicted before the label: those with larger logits, and equal ones that come before it.

    NaN for labels below 0.
    """
    label = ops.maximum(labels, 0)
    logits, indices, at_label = accurate(logits), classes(logits), accurate(ops.take_along_axis(logits, label, axis=1))
    # Negated, so that NaN is ahead too.
    behind = ops.where(indices < label, logits < at_label, logits <= at_label)
    ahead = ops.sum(ops.cast(ops.logical_not(behind), logits.dtype), axis=1, keepdims=True)
    return ops.where(labels < 0, ops.full_like(ahead, float("nan")), ahead)
