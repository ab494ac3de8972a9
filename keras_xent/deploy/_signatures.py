"""Functions behind the signatures of an exported SavedModel, and the inputs of each."""

import inspect
from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from keras_xent import _keras, losses, provenance
from keras_xent._backend import assert_in_graph
from keras_xent.kernels import sparse_softmax, sparse_softmax_cross_entropy
from keras_xent.kernels._labels import class_indices, in_range, valid_mask

if keras.backend.backend() == "tensorflow":
    import tensorflow as tf

# A function, and the shape, dtype and name of each of its inputs.
Signature = tuple[Callable, list[Any]]

_SPARSE = (losses.SparseCategoricalCrossentropy, keras.losses.SparseCategoricalCrossentropy)
_SPARSE_FUNCTIONS = (losses.sparse_categorical_crossentropy, keras.losses.sparse_categorical_crossentropy)


def causal_lm(model: Any, ignore_class: int | None) -> dict[str, Signature]:
    """Signatures of a language model, whose logits `[B, T, V]` predict the token that comes after each of `[B, T]`."""
    batch, length = model.inputs[0].shape
    # `score` takes one token more than the model, which is not given the last one.
    scored = (batch, None if length is None else length + 1)
    # A default that is a tensor is kept in the signature, for TensorFlow Serving.
    default_mask = tf.ones([size or 1 for size in scored], tf.bool)

    def serve(token_ids):
        return _predictions(model, token_ids)

    def statistics(token_ids, mask, ranks):
        valid = valid_mask(token_ids, ops.broadcast_to(mask, ops.shape(token_ids)), ignore_class)
        token_ids = _checked_tokens(token_ids, valid, model.outputs[0].shape[-1])
        labels, valid = token_ids[:, 1:], valid[:, 1:]
        predictions = model(token_ids[:, :-1], training=False)
        keras_mask = _keras.mask_of(predictions)
        if keras_mask is not None:
            valid = ops.logical_and(valid, keras_mask)
        return *token_statistics(labels, predictions, valid, model.loss, ranks=ranks), valid

    def score(token_ids, mask=default_mask):
        nll, _, valid = statistics(token_ids, mask, ranks=False)
        log_likelihood, num_tokens = -ops.sum(nll, axis=1), ops.sum(ops.cast(valid, "int32"), axis=1)
        mean = log_likelihood / ops.cast(ops.maximum(num_tokens, 1), nll.dtype)
        return {
            "token_log_likelihood": -nll,
            "token_mask": valid,
            "log_likelihood": log_likelihood,
            "num_tokens": num_tokens,
            # LiteRT computes 0 / 0 as 0.
            "perplexity": ops.where(num_tokens > 0, ops.exp(-mean), float("nan")),
        }

    def rank(token_ids, mask=default_mask):
        nll, token_rank, valid = statistics(token_ids, mask, ranks=True)
        return {"token_log_likelihood": -nll, "token_rank": token_rank, "token_mask": valid}

    def train_step(token_ids, targets, sample_weight):
        return _train(model, token_ids, targets, sample_weight)

    ids = _spec("token_ids", "int32", batch, length)
    train = [ids, _spec("targets", "int32", batch, length), _spec("sample_weight", "float32", batch, length)]
    ids_and_mask = [_spec("token_ids", "int32", *scored), _spec("mask", "bool", *scored)]
    return {
        "serve": (serve, [ids]),
        "score": (score, ids_and_mask),
        "rank": (rank, ids_and_mask),
        "train_step": (train_step, train),
    }


def supervised(model: Any) -> dict[str, Signature]:
    """Signatures of a model whose examples have labels; the loss is that of `evaluate`."""

    def serve(inputs):
        return _predictions(model, inputs)

    def score(inputs, labels):
        predictions = model(inputs, training=False)
        return {
            "loss": model.compute_loss(inputs, labels, predictions, training=False),
            "per_example_loss": _unreduced(loss)(labels, predictions),
        }

    def train_step(inputs, labels, sample_weight):
        return _train(model, inputs, labels, sample_weight)

    loss = keras.losses.get(model.loss)
    shape, dtype = model.outputs[0].shape, "float32"
    if is_sparse(loss):
        axis = getattr(loss, "axis", -1) % len(shape)
        shape, dtype = shape[:axis] + shape[axis + 1 :], "int32"
    inputs = _spec("inputs", model.inputs[0].dtype, *model.inputs[0].shape)
    labels = _spec("labels", dtype, *shape)
    return {
        "serve": (serve, [inputs]),
        "score": (score, [inputs, labels]),
        "train_step": (train_step, [inputs, labels, _spec("sample_weight", "float32", shape[0])]),
    }


def is_sparse(loss: Any) -> bool:
    """Returns whether the labels of a loss are indices of classes."""
    return isinstance(loss, _SPARSE) or any(loss is function for function in _SPARSE_FUNCTIONS)


def _unreduced(loss):
    """The loss before its reduction."""
    if not isinstance(loss, keras.losses.Loss):
        return loss
    # `copy.copy` asks Keras, which saves and loads: a user's class may have no configuration.
    copied = object.__new__(type(loss))
    vars(copied).update(vars(loss), reduction=None, normalizer=None)
    return copied


def _reads_logits(loss: Any) -> bool:
    """Returns whether a loss takes predictions for logits. True of one that does not say so, and without a loss."""
    loss = keras.losses.get(loss) if isinstance(loss, str) else loss
    if callable(loss) and not hasattr(loss, "from_logits"):
        # A function, whose default holds.
        parameter = inspect.signature(loss).parameters.get("from_logits")
        return parameter is None or parameter.default is not False
    return getattr(loss, "from_logits", True)


def _spec(name, dtype, *shape):
    return tf.TensorSpec(shape, dtype, name)


def _predictions(model, inputs):
    predictions = model(inputs, training=False)
    logits = provenance.activation_and_logits(predictions)[1]
    are_probabilities = logits is not None or not _reads_logits(model.loss)
    return {"probabilities" if are_probabilities else "logits": predictions}


def _checked_tokens(token_ids, valid, num_classes):
    """The tokens, with 0 in place of masked ones that are out of range, such as padding with -1."""
    is_class = in_range(token_ids, num_classes)
    token_ids = ops.where(is_class, token_ids, ops.zeros_like(token_ids))
    message = [
        f"`token_ids` must be numbers from 0 to {num_classes - 1}, for which the model has logits.",
        "Padding is marked by `mask`, or by the `ignore_class` of the export.",
    ]
    return assert_in_graph(ops.all(ops.logical_or(is_class, ops.logical_not(valid))), lambda: message, token_ids)


def token_statistics(labels: Any, predictions: Any, valid: Any, loss: Any, *, ranks: bool) -> tuple[Any, Any]:
    """Of each token the cross-entropy, and with `ranks` how many classes have larger logits; 0 where not valid.

    The logits are not materialized if the head that computes them is known.
    """
    _, logits = provenance.activation_and_logits(predictions)
    head = provenance.head_of(predictions if logits is None else logits)
    softcap = getattr(loss, "logit_softcap", None)
    if head is not None:
        statistics = head.statistics(labels, valid, softcap, {"rank"} if ranks else ())
        return statistics.nll, ops.cast(statistics.rank, "int32") if ranks else None
    logits = provenance.as_logits(predictions, from_logits=_reads_logits(loss), activation="softmax")
    nll = sparse_softmax_cross_entropy(labels, logits, mask=valid, logit_softcap=softcap)
    if not ranks:
        return nll, None
    rank = sparse_softmax.label_ranks(class_indices(labels, logits.shape[-1], valid), logits)
    return nll, ops.where(valid, ops.cast(rank, "int32"), 0)


def _train(model, inputs, labels, sample_weight):
    """One step of `fit`."""
    variables = model.trainable_variables
    with tf.GradientTape() as tape:
        predictions = model(inputs, training=True)
        loss = model.compute_loss(inputs, labels, predictions, sample_weight, training=True)
        scaled = model.optimizer.scale_loss(loss)
    model.optimizer.apply(tape.gradient(scaled, variables), variables)
    return {"loss": loss}
