"""Perplexity as `fit` and `evaluate` report it, against float64 arithmetic."""

import functools

import keras
import numpy as np
import pytest
from keras import ops

import keras_xent as kx
from tests import oracles
from tests.backend import BACKEND, to_numpy, train_step_hlo
from tests.tiers import fast_for, sample, whole

CLASSES, IGNORED = 23, 3
# Sequences, their length, and how many of their tokens the mask of an Embedding leaves: 32, 8 and 4 in all.
BATCHES = {
    "batches of two shapes": ((2, 16, 16), (4, 6, 2), (2, 16, 2)),
    "batches of one shape": ((2, 16, 16), (2, 16, 4), (2, 16, 2)),
}
MODES = {"auto": {}, "compiled": {"jit_compile": True}, "eager": {"run_eagerly": True}}
LOSSES = {
    "plain": lambda: kx.losses.MaskedSequenceCrossentropy(),
    "options": lambda: kx.losses.MaskedSequenceCrossentropy(ignore_class=IGNORED, label_smoothing=0.1, z_loss=1e-3),
}


every_head = pytest.mark.parametrize("head", [keras.layers.Dense, kx.layers.LogitsDense], ids=["dense", "fused"])


def batches(shapes="batches of one shape"):
    rng = np.random.default_rng(0)
    for sequences, length, valid in BATCHES[shapes]:
        tokens = rng.integers(1, CLASSES, (sequences, length)) * (np.arange(length) < valid)
        labels = rng.integers(0, CLASSES, (sequences, length))
        yield tokens, labels, rng.uniform(0.5, 2, sequences).astype("float32")


def fitted(head, loss, mode, shapes):
    """Reports of training, validation and evaluation of a model whose weights stay what they are."""
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((None,)), keras.layers.Embedding(CLASSES, 8, mask_zero=True), head(CLASSES)])
    model.layers[0].set_weights([np.random.default_rng(2).normal(size=(CLASSES, 8))])
    model.compile(
        keras.optimizers.SGD(0.0),
        loss,
        metrics=[
            kx.metrics.Perplexity(),
            kx.metrics.Perplexity(ignore_class=IGNORED, name="ignoring"),
            kx.metrics.TokenAccuracy(),
            kx.metrics.TokenAccuracy(top_k=5),
        ],
        weighted_metrics=[kx.metrics.Perplexity(name="weighted")],
        **MODES[mode],
    )
    history = model.fit(batches(shapes), steps_per_epoch=3, verbose=0, validation_data=list(batches(shapes))[0]).history
    evaluated = model.evaluate(batches(shapes), steps=3, verbose=0, return_dict=True)
    return model, {name: values[-1] for name, values in history.items()}, evaluated


def expected(model, data):
    totals = np.zeros((5, 2))
    for tokens, labels, weights in data:
        logits = to_numpy(model(tokens))
        nll = oracles.sparse(labels.ravel(), logits.reshape(-1, CLASSES))[0].reshape(labels.shape)
        rank = (logits > np.take_along_axis(logits, labels[..., None], axis=-1)).sum(-1)
        mask = 1.0 * (tokens != 0)
        of = (
            (nll, mask),
            (nll, mask * (labels != IGNORED)),
            (rank < 1, mask),
            (rank < 5, mask),
            (nll, mask * weights[:, None]),
        )
        totals += [((value * weight).sum(), weight.sum()) for value, weight in of]
    means = totals[:, 0] / totals[:, 1]
    names = ("perplexity", "ignoring", "token_accuracy", "top_5_token_accuracy", "weighted")
    return dict(zip(names, np.where([True, True, False, False, True], np.exp(means), means), strict=True))


@fast_for("fused-batches of one shape-plain-auto")
@pytest.mark.parametrize(
    "shapes, loss, mode",
    sample(
        [
            ("batches of one shape", "plain", "auto"),
            *(("batches of two shapes", "plain", mode) for mode in MODES),
            ("batches of two shapes", "options", "auto"),
        ],
        [("batches of one shape", "plain", "auto")],
    ),
)
@every_head
def test_fit_and_evaluate_agree_with_float64_under_masks_weights_and_ignored_labels(head, shapes, loss, mode):
    model, trained, evaluated = fitted(head, LOSSES[loss](), mode, shapes)
    all_batches = list(batches(shapes))
    for report, prefix, data in (
        (trained, "", all_batches),
        (trained, "val_", all_batches[:1]),
        (evaluated, "", all_batches),
    ):
        for name, value in expected(model, data).items():
            np.testing.assert_allclose(report[f"{prefix}{name}"], value, rtol=1e-6, err_msg=f"{prefix}{name}")


@whole
def test_a_validation_without_weights_takes_no_mask_from_a_later_batch():
    """On JAX the mask of a step is known to its loss only, which keeps what the metric will ask for."""
    keras.utils.set_random_seed(1)
    embedding = keras.layers.Embedding(CLASSES, 8, mask_zero=True, embeddings_initializer="normal")
    model = keras.Sequential([keras.Input((None,)), embedding, keras.layers.Dense(CLASSES)])
    model.compile(keras.optimizers.SGD(0.0), LOSSES["options"](), weighted_metrics=[kx.metrics.Perplexity()])
    for tokens, labels, weights in batches("batches of two shapes"):
        rows = {"sample_weight": weights, "batch_size": len(tokens), "verbose": 0}
        history = model.fit(tokens, labels, validation_data=(tokens, labels), **rows).history
        valid = tokens != 0
        nll = oracles.sparse(labels[valid], to_numpy(model(tokens)).astype("float64")[valid])[0]
        of_tokens = np.broadcast_to(weights[:, None], tokens.shape)[valid]
        weighted = np.exp((of_tokens * nll).sum() / of_tokens.sum())
        assert history["perplexity"][0] == pytest.approx(weighted, rel=1e-5)
        assert history["val_perplexity"][0] == pytest.approx(np.exp(nll.mean()), rel=1e-5)


@whole
@every_head
def test_each_of_several_outputs_has_its_own_statistics(head):
    """Also on JAX, where all losses hand what they know to all metrics; and other metrics that live do not matter."""
    strangers = [kx.metrics.BitsPerByte([1.0] * 4), kx.metrics.Perplexity(axis=1)]
    tokens, labels, _ = next(batches())
    keras.utils.set_random_seed(1)
    inputs = keras.Input((None,))
    hidden = keras.layers.Embedding(CLASSES, 8, mask_zero=True)(inputs)
    sizes = {"a": CLASSES, "b": 7}
    model = keras.Model(inputs, {name: head(size, name=name)(hidden) for name, size in sizes.items()})
    given = {"a": labels, "b": labels % 7}
    metrics = {name: [kx.metrics.Perplexity(), kx.metrics.BitsPerByte([2.0] * size)] for name, size in sizes.items()}
    losses = {name: kx.losses.MaskedSequenceCrossentropy(ignore_class=IGNORED) for name in sizes}
    model.compile(keras.optimizers.SGD(0.0), losses, metrics=metrics)
    report = model.train_on_batch(tokens, given, return_dict=True)
    logits = model(tokens)
    for name, size in sizes.items():
        nll = oracles.sparse(given[name].ravel(), to_numpy(logits[name]).reshape(-1, size))[0][tokens.ravel() != 0]
        np.testing.assert_allclose(report[f"{name}_perplexity"], np.exp(nll.mean()), rtol=1e-6)
        np.testing.assert_allclose(report[f"{name}_bits_per_byte"], nll.mean() / np.log(2) / 2, rtol=1e-6)
    assert len(strangers) == 2


def test_a_softmax_before_a_metric_of_logits_warns_once():
    model = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(6, activation="softmax"), keras.layers.Reshape((6,))]
    )
    # A foreign loss leaves nothing for the metric. Behind a reshape, TensorFlow does not see the softmax either.
    model.compile("sgd", "sparse_categorical_crossentropy", metrics=[kx.metrics.Perplexity()])
    x, y = np.random.default_rng(0).normal(size=(8, 4)), np.zeros((8,), int)
    with pytest.warns(UserWarning) as warned:
        model.fit(x, y, epochs=2, verbose=0)
    assert [str(w.message) for w in warned if "Perplexity" in str(w.message)] == [
        f"Perplexity has from_logits=True, but the layer '{model.layers[0].name}' makes probabilities of them by a "
        "softmax. Set from_logits=False, or end the model in logits."
    ]
    metric = kx.metrics.Perplexity()
    with pytest.warns(UserWarning) as warned:
        for _ in range(2):
            metric.update_state(np.array([0, 1]), np.array([[0.25, 0.75], [0.5, 0.5]]))
    assert [str(w.message) for w in warned] == [
        "Perplexity has from_logits=True, but the rows of `y_pred` are probabilities: none is below 0, and they sum to "
        "1. Set from_logits=False, or end the model in logits."
    ]


def test_many_tokens_at_once_are_summed_as_exactly_as_few():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(0, 4, (2**18, 2)).astype("float32"), rng.integers(0, 2, 2**18)
    # Of two classes, the loss is softplus of the other logit minus the label's.
    total = np.logaddexp(0, (1 - 2 * labels) * (logits[:, 1].astype("float64") - logits[:, 0])).sum()
    for mode in (lambda f: f, in_one_program):
        metric = kx.metrics.Perplexity()
        mode(metric.update_state)(ops.convert_to_tensor(labels), ops.convert_to_tensor(logits))
        np.testing.assert_allclose(metric.totals().total, total, rtol=1e-6)


def in_one_program(update):
    """What `jit_compile=True` makes of it; JAX is compiled as it is."""
    if BACKEND == "jax":
        return update
    import tensorflow as tf

    return tf.function(update, jit_compile=True, autograph=False)


def test_an_out_of_range_label_is_not_a_correct_prediction():
    metric = kx.metrics.TokenAccuracy()
    logits = np.array([[[0.3, 0.2, 0.0], [0.0, 0.0, 1.0]]], "float32")
    with pytest.raises(ValueError, match="`y_true`"):
        metric.update_state(np.array([[-100, 9]]), logits)
    labels = np.array([[-100, 2]])
    if BACKEND == "tensorflow":
        in_one_program(metric.update_state)(ops.convert_to_tensor(labels), ops.convert_to_tensor(logits))
        assert np.isnan(to_numpy(metric.result()))
    else:
        import jax

        variables = jax.jit(metric.stateless_update_state)([v.value for v in metric.variables], labels, logits)
        assert np.isnan(to_numpy(metric.stateless_result(variables)))


# No second softmax.


@functools.cache
def exponentials(metrics, head):
    """How many exponentials of a row of logits the compiled training step takes."""
    model = keras.Sequential([keras.Input((5,)), keras.layers.Embedding(7, 8), head(CLASSES)])
    model.compile("sgd", kx.losses.MaskedSequenceCrossentropy(), metrics=list(metrics))
    x, y = np.ones((3, 5), int), np.ones((3, 5), int)
    # Builds what the first batch builds.
    model.train_on_batch(x, y)
    text = train_step_hlo(model, x, y)
    return len([line for line in text.splitlines() if f",{CLASSES}]" in line and " exponential(" in line])


@whole
@fast_for("dense")
@every_head
def test_metrics_add_no_softmax_to_the_step(head):
    without = exponentials((), head)
    assert without > 0
    with_all = (kx.metrics.Perplexity(), kx.metrics.TokenAccuracy(), kx.metrics.TokenAccuracy(top_k=3))
    assert exponentials(with_all, head) == without


@pytest.mark.whole
def test_a_softmax_that_a_metric_adds_would_be_counted():
    own = (kx.metrics.Perplexity(logit_softcap=30.0),)
    assert exponentials(own, keras.layers.Dense) > exponentials((), keras.layers.Dense)
