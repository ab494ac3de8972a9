"""What a loss is, written naively in float64: which elements count, how they are weighted and averaged.

`coefficients` gives the number by which each element's loss is multiplied, so that the loss is `sum(c * l)` and the
gradient `c * dl/dx` whatever the reduction.
"""

import numpy as np

from tests import oracles


def elements(name, labels, logits, *, axis=-1, ignore_class=None, **options):
    """Losses, their gradients for the logits, which elements have a label, and the class weights of the labels."""
    logits = np.moveaxis(np.asarray(logits, np.float64), axis, -1)
    labels = np.asarray(labels)
    *outer, classes = logits.shape
    rows = logits.reshape(-1, classes)
    if name == "BinaryCrossentropy":
        result = _binary(np.moveaxis(labels, axis, -1).reshape(rows.shape), rows, ignore_class, options)
    elif name == "CategoricalCrossentropy":
        targets = np.moveaxis(labels, axis, -1).reshape(rows.shape).astype(np.float64)
        losses, gradients, _ = oracles.softmax(targets, rows, **options)
        weights = targets @ options.get("class_weight", np.ones(classes))
        result = losses, gradients, np.ones(len(rows), bool), weights
    else:
        result = _sparse(labels.reshape(-1), rows, ignore_class, options)
    losses, gradients, labelled, weights = result
    gradients = np.moveaxis(gradients.reshape(logits.shape), -1, axis)
    return losses.reshape(outer), gradients, labelled.reshape(outer), weights.reshape(outer)


def _binary(labels, rows, ignore_class, options):
    missing = np.isnan(labels) if ignore_class is not None and np.isnan(ignore_class) else labels == ignore_class
    there = ~np.broadcast_to(missing, rows.shape)
    losses, gradients, _ = oracles.sigmoid(np.where(there, labels, 0), rows, **options)
    count = np.maximum(there.sum(axis=1), 1)
    losses = np.where(there, losses, 0).sum(axis=1) / count
    gradients = np.where(there, gradients, 0) / count[:, None]
    return losses, gradients, there.any(axis=1), np.ones(len(rows))


def _sparse(labels, rows, ignore_class, options):
    there = labels != ignore_class if ignore_class is not None else np.ones(len(rows), bool)
    losses, gradients, weights = np.zeros(len(rows)), np.zeros(rows.shape), np.zeros(len(rows))
    losses[there], gradients[there] = oracles.sparse(labels[there], rows[there], **options)
    weights[there] = np.asarray(options.get("class_weight", np.ones(rows.shape[1])))[labels[there]]
    return losses, gradients, there, weights


def coefficients(reduction, valid, weights=1.0, label_weights=1.0, normalizer=None):
    """The factor of each element's loss. All arrays have the shape of the losses, or are numbers."""
    valid = np.asarray(valid, np.float64)
    weights = weights * valid
    mass = weights * np.where(weights == 0, 0, label_weights)
    if reduction in (None, "none"):
        return weights
    if reduction == "sequence_mean":
        shares = np.zeros(valid.shape)
        for i in range(len(valid)):
            shares[i] = _over(weights[i], mass[i].sum())
        sequences = sum(row.any() for row in weights) if normalizer is None else normalizer
        return _over(shares, sequences)
    if normalizer is not None:
        return weights / normalizer
    denominator = {
        "sum": 1.0,
        "mean": valid.sum(),
        "sum_over_batch_size": valid.sum(),
        "mean_with_sample_weight": weights.sum(),
        "token_mean": mass.sum(),
    }
    return _over(weights, denominator[reduction])


def _over(numerator, denominator):
    return numerator / denominator if denominator else np.zeros_like(numerator)
