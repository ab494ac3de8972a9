"""Divergence of a student's predictions from its teacher's."""

import keras
from keras import ops

from keras_xent import _accumulation, _endings, _keras, arguments, provenance
from keras_xent._backend import is_eager, no_autograph, on_any_mesh
from keras_xent._named_arguments import NamedArguments
from keras_xent._types import DivergenceName, DType, Reduction, Tensor
from keras_xent.kernels import linear_distillation
from keras_xent.kernels import reduction as _reduction
from keras_xent.kernels._divergence import Divergence, Softmax, divergence_of_rows
from keras_xent.kernels._dtypes import accumulator_dtype, to_float_tensor
from keras_xent.kernels._masking import both, where_or_zero
from keras_xent.kernels._shapes import align_weights, same_shape
from keras_xent.losses._accumulation_warning import warn_of_accumulation
from keras_xent.losses._fused import call_reads_logits


@keras.saving.register_keras_serializable(package="keras_xent")
class Distillation(NamedArguments, keras.losses.Loss):
    """Distillation: the student learns the teacher's predicted distributions.

    `y_true` holds the teacher's logits and `y_pred` the student's, of which a softmax is undone where it is known. In a
    compiled step, where both come from heads (`LogitsDense`, `TiedLogits`, `fuse_head`), neither model's logits are
    stored. The teacher gets no gradient.

    Formula, with `p = softmax(y_true / T)`, `q = softmax(y_pred / T)` and `m = beta p + (1 - beta) q`: `"forward_kl"`
    is `T^2 KL(p || q)`, `"reverse_kl"` is `T^2 KL(q || p)`, `"jensen_shannon"` is
    `T^2 (beta KL(p || m) + (1 - beta) KL(q || m))`.

    Args:
        temperature: `T`.
        divergence: `"forward_kl"`, `"reverse_kl"` or `"jensen_shannon"`.
        beta: weight of the teacher in the mixture of Jensen and Shannon, between 0 and 1.
        reduction: `"sum_over_batch_size"` and the other names of Keras, `"sequence_mean"`, or `"token_mean"` for
            sequences with padding.
        name: name of the loss.
        dtype: dtype of the result (default float32).

    Call arguments: `y_true` and `y_pred` `[..., V]`, `sample_weight` a scalar, `[B]`, `[B, 1]` or `[...]`. Tokens that
    the Keras mask of the predictions leaves out, or of weight 0, do not count.

    Raises:
        ValueError: an argument out of its range; shapes that do not fit.

    Warns:
        UserWarning: a model ends in an activation.

    Example:

    >>> import numpy as np
    >>> import keras_xent as kx
    >>> loss = kx.losses.Distillation(temperature=2.0)
    >>> round(float(loss(np.array([[2.0, 0.0, -3.0]]), np.array([[-1.0, 4.0, 0.0]]))), 4)
    5.0694

    In a model, trained on the logits of a teacher:

    >>> import keras
    >>> student = keras.Sequential([keras.layers.Dense(3)])
    >>> student.compile("adam", loss)
    >>> # student.fit(x, teacher.predict(x))

    References: arXiv:1503.02531; arXiv:2306.13649.
    """

    def __init__(
        self,
        temperature: float = 1.0,
        divergence: DivergenceName = "forward_kl",
        *,
        beta: float = 0.5,
        reduction: Reduction | None = "sum_over_batch_size",
        name: str | None = "distillation",
        dtype: DType = None,
    ) -> None:
        self._given_dtype = arguments.dtype_or_none("dtype", dtype)
        super().__init__(name=name, reduction=None, dtype=self._given_dtype)
        self.reduction = _reduction.checked_reduction(reduction)
        self.temperature = arguments.above_zero("temperature", temperature)
        self._divergence = Divergence(divergence, beta)
        self.divergence, self.beta = divergence, beta
        self._warned = set()

    @no_autograph
    def __call__(self, y_true: Tensor, y_pred: Tensor, sample_weight: Tensor = None) -> Tensor:
        """The reduced loss, a scalar of the loss's dtype (of the shape of the tokens for reduction None)."""
        teacher = provenance.read_variable(arguments.tensor("y_true", y_true))
        student = provenance.read_variable(arguments.tensor("y_pred", y_pred))
        if not same_shape(teacher.shape, student.shape):
            raise ValueError(
                "`y_true` must hold the teacher's logits, of the shape of `y_pred`: both models predict the same "
                f"classes. Received: y_true of shape {tuple(teacher.shape)} and y_pred of shape {tuple(student.shape)}."
            )
        warn_of_accumulation(self, student, sample_weight)
        with keras.name_scope(self.name):
            shape = student.shape[:-1]
            valid = both(*(align_weights(_keras.mask_of(one), shape, "mask") for one in (student, teacher)))
            weights = align_weights(sample_weight, shape)
            is_overridden = getattr(self.call, "__func__", None) is not Distillation.call
            if not is_overridden:
                _check_classes(student)
                teacher, student = self._logits(teacher), self._logits(student)
            of_teacher, of_student = (None if is_eager(one) else provenance.head_of(one) for one in (teacher, student))
            if is_overridden:
                loss = self._overridden(teacher, student, valid, weights, of_student)
            elif of_teacher is None or of_student is None or _accumulation.is_counting():
                loss = on_any_mesh(self._dense)(teacher, student, valid, weights)
            else:
                loss = self._fused(of_teacher, of_student, valid, weights)
            return ops.cast(loss, self.dtype)

    @no_autograph
    def call(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        """The losses before masks, weights and reduction. A subclass may override it, as any `call` of Keras."""
        return ops.cast(self._losses(y_true, y_pred, None), self.dtype)

    def _logits(self, predictions):
        """The logits before a softmax, if that is known to have made the predictions, else these."""
        activation, logits = provenance.activation_and_logits(predictions)
        if logits is None and not is_eager(predictions):
            # Of what JAX traces only the layers of the model tell.
            activation = getattr(_endings.ending(predictions), "kind", None)
        if activation not in ("softmax", "sigmoid", "other"):
            return predictions
        is_undone = activation == "softmax" and logits is not None
        use = "uses the logits before it" if is_undone else "takes its output as logits"
        kind = "softmax over another axis" if activation == "other" else activation
        self._warn_once(
            "activation",
            f"{type(self).__name__} compares logits, but {_endings.layer_of(predictions)} ends in a {kind}. "
            f"The loss {use}. Remove the activation.",
        )
        return logits if is_undone else predictions

    def _overridden(self, teacher, student, valid, weights, head):
        """Applies masks, weights and reduction to the losses that a user's `call` returns."""
        if head is not None:
            self._warn_once("call", call_reads_logits(self, head))
        logits = (ops.convert_to_tensor(one, dtype=self.dtype) for one in self._selected(teacher, student, valid))
        losses = ops.convert_to_tensor(self.call(*logits))
        losses = ops.cast(losses, "float64" if self.dtype == "float64" else "float32")
        if not len(losses.shape):
            # One number for the batch, as Keras weights it.
            losses, valid = losses if weights is None else losses * ops.cast(weights, losses.dtype), None
            return _accumulation.reduce(losses, reduction=self.reduction) if len(losses.shape) else losses
        valid, weights = (align_weights(one, losses.shape) for one in (valid, weights))
        return _accumulation.reduce(losses, reduction=self.reduction, valid=valid, weights=weights)

    def _selected(self, teacher, student, valid):
        """The logits of both, 0 where a token is masked, so that NaN there reaches no gradient."""
        keep = None if valid is None else ops.expand_dims(valid, -1)
        return tuple(where_or_zero(to_float_tensor(one), keep) for one in (teacher, student))

    def _fused(self, teacher, student, valid, weights):
        return linear_distillation(
            teacher_hidden=ops.stop_gradient(teacher.hidden),
            teacher_kernel=teacher.merged_kernel(),
            teacher_bias=teacher.bias,
            temperature=self.temperature,
            divergence=self.divergence,
            beta=self.beta,
            transpose_teacher_kernel=teacher.transpose_kernel,
            token_weights=weights,
            mask=valid,
            logit_softcap=student.logit_softcap,
            teacher_logit_softcap=teacher.logit_softcap,
            reduction=self.reduction,
            normalizer=_accumulation.divisor(None),
            training=student.training,
            gradients=student.gradients,
            **student.arguments(),
        )

    def _dense(self, teacher, student, valid, weights):
        if _accumulation.is_counting():
            # A graph would compute the predictions for their shape alone.
            student = ops.zeros_like(teacher)
        losses = self._losses(teacher, student, valid)
        return _accumulation.reduce(losses, reduction=self.reduction, valid=valid, weights=weights)

    def _losses(self, teacher, student, valid):
        """The divergence of each token, from the logits."""
        teacher, student = self._selected(teacher, student, valid)
        shape, dtype = ops.shape(student), accumulator_dtype(student)
        if accumulator_dtype(teacher) != dtype:
            teacher = ops.cast(teacher, dtype)
        rows = [ops.reshape(x, (-1, shape[-1])) for x in (student, teacher)]
        losses = divergence_of_rows(*rows, divergence=self._divergence, softmax=Softmax(self.temperature, None))
        return ops.reshape(losses, shape[:-1])


def _check_classes(student):
    if not len(student.shape) or student.shape[-1] == 1:
        raise ValueError(
            "`y_pred` must have two classes or more: of one the softmax is 1 whatever the logit, and the loss 0. "
            f"Received: shape {tuple(student.shape)}. For a yes-or-no answer of one unit use BinaryCrossentropy, with "
            "the teacher's probabilities as labels."
        )
