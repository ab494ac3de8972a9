"""What a SavedModel of ours computes: the functions behind its signatures, and the inputs that each takes."""

from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from keras_xent import _keras, losses, provenance
from keras_xent._backend import assert_in_graph
from keras_xent.kernels import sparse_softmax_cross_entropy
from keras_xent.kernels._labels import in_range, valid_mask

if keras.backend.backend() == "tensorflow":
    import tensorflow as tf

# A function, and the shape, dtype and name of each of its inputs.
Endpoint = tuple[Callable, list[Any]]


def of_tokens(model: Any, ignore_class: int | None) -> dict[str, Endpoint]:
    """Endpoints of a language model, whose logits `[B, T, V]` predict the token that comes after each of `[B, T]`."""

    def serve(token_ids):
        return _predictions(model, token_ids)

    # A default that is a tensor is kept in the signature, for TensorFlow Serving.
    everything = tf.constant([[True]])

    def score(token_ids, mask=everything):
        counts = valid_mask(token_ids, ops.broadcast_to(mask, ops.shape(token_ids)), ignore_class)
        token_ids = _tokens(token_ids, counts, model.outputs[0].shape[-1])
        labels, counts = token_ids[:, 1:], counts[:, 1:]
        predictions = model(token_ids[:, :-1], training=False)
        known = _keras.mask_of(predictions)
        if known is not None:
            counts = ops.logical_and(counts, known)
        each = -_nll(labels, predictions, counts, model.loss)
        total, number = ops.sum(each, axis=1), ops.sum(ops.cast(counts, "int32"), axis=1)
        mean = total / ops.cast(ops.maximum(number, 1), total.dtype)
        # LiteRT makes 0 of 0 / 0, so nan is said.
        perplexity = ops.where(number > 0, ops.exp(-mean), float("nan"))
        return {
            "token_log_likelihood": each,
            "log_likelihood": total,
            "num_tokens": number,
            "perplexity": perplexity,
        }

    def train_step(token_ids, targets, sample_weight):
        return _train(model, token_ids, targets, sample_weight)

    ids = _spec("token_ids", "int32", None, None)
    weights = _spec("sample_weight", "float32", None, None)
    return {
        "serve": (serve, [ids]),
        "score": (score, [ids, _spec("mask", "bool", None, None)]),
        "train_step": (train_step, [ids, _spec("targets", "int32", None, None), weights]),
    }


def of_labels(model: Any) -> dict[str, Endpoint]:
    """Endpoints of a model whose examples have labels; the loss is that of `evaluate`."""

    def serve(inputs):
        return _predictions(model, inputs)

    def score(inputs, labels):
        predictions = model(inputs, training=False)
        each = loss
        if isinstance(loss, keras.losses.Loss):
            each = type(loss).from_config({**loss.get_config(), "reduction": None})
        return {
            "loss": model.compute_loss(inputs, labels, predictions, training=False),
            "per_example_loss": each(labels, predictions),
        }

    def train_step(inputs, labels, sample_weight):
        return _train(model, inputs, labels, sample_weight)

    loss = keras.losses.get(model.loss)
    shape, dtype = model.outputs[0].shape, "float32"
    if isinstance(loss, _SPARSE) or loss is keras.losses.sparse_categorical_crossentropy:
        axis = getattr(loss, "axis", -1) % len(shape)
        shape, dtype = shape[:axis] + shape[axis + 1 :], "int32"
    inputs = _spec("inputs", model.inputs[0].dtype, *model.inputs[0].shape)
    labels = _spec("labels", dtype, *shape)
    return {
        "serve": (serve, [inputs]),
        "score": (score, [inputs, labels]),
        "train_step": (train_step, [inputs, labels, _spec("sample_weight", "float32", None)]),
    }


_SPARSE = (losses.SparseCategoricalCrossentropy, keras.losses.SparseCategoricalCrossentropy)


def _spec(name, dtype, *shape):
    return tf.TensorSpec(shape, dtype, name)


def _predictions(model, inputs):
    predictions = model(inputs, training=False)
    behind = provenance.activation_and_logits(predictions)[1]
    probable = behind is not None or getattr(model.loss, "from_logits", True) is False
    return {"probabilities" if probable else "logits": predictions}


def _tokens(token_ids, counts, num_classes):
    """The tokens, 0 in the place of what does not count and is none, such as padding with -1."""
    known = in_range(token_ids, num_classes)
    token_ids = ops.where(known, token_ids, ops.zeros_like(token_ids))
    rule = f"`token_ids` must be numbers from 0 to {num_classes - 1}, for which the model has logits."
    told = [rule, "Padding is marked by `mask`, or by the `ignore_class` of the export."]
    return assert_in_graph(ops.all(ops.logical_or(known, ops.logical_not(counts))), lambda: told, token_ids)


def _nll(labels, predictions, counts, loss):
    """The cross-entropy of each token, 0 where it does not count; without the logits, if their head is known."""
    activation, logits = provenance.activation_and_logits(predictions)
    head = provenance.head_of(predictions if logits is None else logits)
    softcap = getattr(loss, "logit_softcap", None)
    if head is None:
        from_logits = getattr(loss, "from_logits", True)
        logits = provenance.as_logits(predictions, from_logits=from_logits, activation="softmax")
        return sparse_softmax_cross_entropy(labels, logits, mask=counts, logit_softcap=softcap)
    return head.statistics(labels, counts, softcap).nll


def _train(model, inputs, labels, sample_weight):
    """One step of `fit`."""
    variables = model.trainable_variables
    with tf.GradientTape() as tape:
        predictions = model(inputs, training=True)
        loss = model.compute_loss(inputs, labels, predictions, sample_weight, training=True)
        scaled = model.optimizer.scale_loss(loss)
    model.optimizer.apply(tape.gradient(scaled, variables), variables)
    return {"loss": loss}
