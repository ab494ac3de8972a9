"""Perplexity by group: against float64 arithmetic, in `fit` and by hand."""

import keras
import numpy as np
import pytest

import keras_xent as kx
from tests.backend import BACKEND, to_numpy
from tests.tiers import fast_for, sample, whole

CLASSES, ROWS, LENGTH, GROUPS = 23, 10, 16, ["code", "prose", "chat"]
MODES = {"auto": {}, "compiled": {"jit_compile": True}, "eager": {"run_eagerly": True}}


def data():
    """Padded tokens, labels, the domain of each row (one of them in no group), and weights."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, LENGTH + 1, (ROWS, 1))
    tokens = rng.integers(1, CLASSES, (ROWS, LENGTH)) * (np.arange(LENGTH) < lengths)
    return tokens, rng.integers(0, CLASSES, tokens.shape), np.arange(ROWS) % 4, rng.uniform(0.1, 2, ROWS)


def expected(name, logits, labels, weights, groups):
    """Perplexities of all tokens and of those of each group, in float64."""
    logits = logits.astype("float64")
    log_sum_exp = np.log(np.exp(logits).sum(-1))
    nll = log_sum_exp - np.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    chosen = {name: weights} | {f"{name}/{g}": weights * (groups == i) for i, g in enumerate(GROUPS)}
    return {name: np.exp((w * nll).sum() / w.sum()) for name, w in chosen.items() if w.any()}


CASES = [(head, mode) for head in (kx.layers.LogitsDense, keras.layers.Dense) for mode in MODES]


@whole
@fast_for("LogitsDense-auto")
@pytest.mark.parametrize("head, mode", sample(CASES, [(kx.layers.LogitsDense, "auto")]))
def test_a_group_of_each_example_in_fit(head, mode):
    tokens, labels, domains, weights = data()
    keras.utils.set_random_seed(1)
    inputs = keras.Input((None,), name="tokens", dtype="int32")
    model = keras.Model([inputs], head(CLASSES)(keras.layers.Embedding(CLASSES, 8, mask_zero=True)(inputs)))
    of_domain = {"groups": GROUPS, "group_of": "domain"}
    model.compile(
        keras.optimizers.SGD(0.0),
        kx.losses.MaskedSequenceCrossentropy(),
        metrics=[kx.metrics.Perplexity(**of_domain)],
        weighted_metrics=[kx.metrics.Perplexity(name="weighted", **of_domain)],
        **MODES[mode],
    )
    x = {"tokens": tokens, "domain": domains}
    validation = ({"tokens": tokens[:5], "domain": domains[:5]}, labels[:5], weights[:5])
    logged = model.fit(x, labels, 5, sample_weight=weights, verbose=0, validation_data=validation).history
    logits, valid = model.predict(tokens, batch_size=5, verbose=0), tokens > 0
    for prefix, rows in (("", slice(None)), ("val_", slice(5))):
        of_rows = logits[rows], labels[rows]
        groups = domains[rows, None]
        right = expected("perplexity", *of_rows, valid[rows], groups)
        right |= expected("weighted", *of_rows, valid[rows] * weights[rows, None], groups)
        for name, value in right.items():
            np.testing.assert_allclose(logged[prefix + name], value, rtol=1e-6, err_msg=prefix + name)


def test_a_group_of_each_token_by_a_function_of_the_labels():
    _, labels, _, weights = data()
    logits = np.random.default_rng(3).standard_normal((*labels.shape, CLASSES)).astype("float32")
    metric = kx.metrics.Perplexity(ignore_class=5, groups=GROUPS, group_of=lambda labels: labels % 5)
    for rows in (slice(0, 3), slice(3, ROWS)):
        metric.update_state(labels[rows], logits[rows], weights[rows])
    result = {name: float(to_numpy(value)) for name, value in metric.result().items()}
    right = expected("perplexity", logits, labels, (labels != 5) * weights[:, None], labels % 5)
    assert list(result) == list(right)
    np.testing.assert_allclose(list(result.values()), list(right.values()), rtol=1e-6)
    assert float(metric.nll()) == pytest.approx(np.log(right["perplexity"]), rel=1e-6)
    assert metric.totals().tokens == (labels != 5).sum()


@whole
def test_groups_of_tokens_beside_an_output_without_tokens():
    """On JAX every loss of a step tells every metric what it knows."""
    tokens, labels, _, _ = data()
    groups = tokens % 4
    inputs = keras.Input((LENGTH,), name="tokens", dtype="int32")
    hidden = keras.layers.Embedding(CLASSES, 8)(inputs)
    outputs = {
        "text": kx.layers.LogitsDense(CLASSES, name="text")(hidden),
        "topic": keras.layers.Dense(3, name="topic")(keras.layers.GlobalAveragePooling1D()(hidden)),
    }
    model = keras.Model([inputs], outputs)
    losses = {name: kx.losses.SparseCategoricalCrossentropy(from_logits=True) for name in outputs}
    metric = kx.metrics.Perplexity(groups=GROUPS, group_of="groups")
    model.compile(keras.optimizers.SGD(0.0), losses, metrics={"text": [metric]})
    x, y = {"tokens": tokens, "groups": groups}, {"text": labels, "topic": labels[:, 0] % 3}
    logged = model.fit(x, y, 5, verbose=0).history
    right = expected("perplexity", to_numpy(model(tokens)["text"]), labels, np.ones(labels.shape), groups)
    for name, value in right.items():
        np.testing.assert_allclose(logged[name], value, rtol=1e-6)


def test_a_group_without_a_token_is_nan():
    metric = kx.metrics.Perplexity(groups=["some", "none"], group_of=lambda labels: labels * 0)
    metric.update_state(np.array([[0, 1]]), np.zeros((1, 2, 2), "float32"))
    result = metric.result()
    assert float(result["perplexity/some"]) == pytest.approx(2.0)
    assert np.isnan(to_numpy(result["perplexity/none"]))
    metric.reset_state()
    assert all(np.isnan(to_numpy(value)) for value in metric.result().values())


def test_rounding_does_not_grow_with_the_number_of_tokens():
    rng = np.random.default_rng(4)
    labels = rng.integers(0, 2, (1, 300_001))
    logits = rng.standard_normal((*labels.shape, 2)).astype("float32")
    metric = kx.metrics.Perplexity(groups=GROUPS, group_of=lambda labels: labels)
    metric.update_state(labels, logits)
    right = expected("perplexity", logits, labels, np.ones(labels.shape), labels)
    for name in right:
        assert float(metric.result()[name]) == pytest.approx(right[name], rel=1e-6)


@keras.saving.register_keras_serializable(package="tests")
def is_odd(labels):
    return labels % 2


@pytest.mark.parametrize("group_of", ["domain", is_odd], ids=["an entry", "a function"])
def test_the_configuration_has_the_groups(group_of):
    metric = kx.metrics.Perplexity(groups=GROUPS, group_of=group_of)
    copy = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(metric))
    assert copy.groups == GROUPS
    assert copy.group_of == group_of


def test_errors_say_what_is_missing():
    for wrong in ({"groups": GROUPS}, {"group_of": is_odd}, {"groups": GROUPS, "group_of": 3}):
        with pytest.raises(ValueError, match="must be given together"):
            kx.metrics.Perplexity(**wrong)
    for wrong in ([], "ab", ["a", "a"], 2):
        with pytest.raises(ValueError, match="`groups` must be None or a list of different names"):
            kx.metrics.Perplexity(groups=wrong, group_of=is_odd)
    metric = kx.metrics.Perplexity(groups=GROUPS, group_of="domain")
    with pytest.raises(ValueError, match=r"must name an entry of `x`.*give `group_of` as a function"):
        metric.update_state(np.zeros((1, 2), "int32"), np.zeros((1, 2, 3), "float32"))
    metric = kx.metrics.Perplexity(groups=GROUPS, group_of=lambda labels: np.zeros((1, 3)))
    with pytest.raises(ValueError, match="`group_of` must line up"):
        metric.update_state(np.zeros((1, 2), "int32"), np.zeros((1, 2, 3), "float32"))


class OnTensorFlow(keras.Model):
    """A training step as the guide of Keras for TensorFlow writes it."""

    def train_step(self, data):
        import tensorflow as tf

        x, y = data
        with tf.GradientTape() as tape:
            y_pred = self(x, training=True)
            loss = self.compute_loss(x=x, y=y, y_pred=y_pred)
        variables = self.trainable_variables
        self.optimizer.apply(tape.gradient(loss, variables), variables)
        for metric in self.metrics:
            metric.update_state(loss) if metric.name == "loss" else metric.update_state(y, y_pred)
        return {metric.name: metric.result() for metric in self.metrics}

    def test_step(self, data):
        x, y = data
        y_pred = self(x, training=False)
        for metric in self.metrics[1:]:
            metric.update_state(y, y_pred)
        return {metric.name: metric.result() for metric in self.metrics[1:]}


class OnJAX(keras.Model):
    """A training step as the guide of Keras for JAX writes it."""

    def loss_and_updates(self, trainable, others, x, y):
        y_pred, others = self.stateless_call(trainable, others, x, training=True)
        return self.compute_loss(x, y, y_pred), (y_pred, others)

    def train_step(self, state, data):
        import jax

        trainable, others, slots, metrics = state
        x, y = data
        gradient = jax.value_and_grad(self.loss_and_updates, has_aux=True)
        (loss, (y_pred, others)), grads = gradient(trainable, others, x, y)
        trainable, slots = self.optimizer.stateless_apply(slots, grads, trainable)
        logs, metrics = self.updated(metrics, y, y_pred, loss)
        return logs, (trainable, others, slots, metrics)

    def test_step(self, state, data):
        trainable, others, metrics = state
        x, y = data
        y_pred, others = self.stateless_call(trainable, others, x, training=False)
        logs, metrics = self.updated(metrics, y, y_pred)
        return logs, (trainable, others, metrics)

    def updated(self, variables, y, y_pred, loss=None):
        logs, done = {}, []
        for metric in self.metrics:
            own = variables[len(done) : len(done) + len(metric.variables)]
            if metric.name != "loss":
                own = metric.stateless_update_state(own, y, y_pred)
            elif loss is not None:
                own = metric.stateless_update_state(own, loss)
            logs[metric.name] = metric.stateless_result(own)
            done += own
        return logs, done


@whole
@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("mode", MODES)
def test_a_group_of_each_example_in_a_step_of_ones_own(mode, steps):
    tokens, labels, domains, _ = data()
    keras.utils.set_random_seed(1)
    inputs = keras.Input((None,), name="tokens", dtype="int32")
    outputs = kx.layers.LogitsDense(CLASSES)(keras.layers.Embedding(CLASSES, 8)(inputs))
    model = {"tensorflow": OnTensorFlow, "jax": OnJAX}[BACKEND]([inputs], outputs)
    metric = kx.metrics.Perplexity(ignore_class=0, groups=GROUPS, group_of="domain")
    loss = kx.losses.MaskedSequenceCrossentropy(ignore_class=0)
    model.compile(keras.optimizers.SGD(0.0), loss, metrics=[metric], **MODES[mode])
    model = kx.accumulate_gradients(model, steps)
    x = {"tokens": tokens, "domain": domains}
    logged = model.fit(x, labels, 5, verbose=0, validation_data=({"tokens": tokens, "domain": domains}, labels)).history
    logits = model.predict(tokens, batch_size=5, verbose=0)
    right = expected("perplexity", logits, labels, labels > 0, domains[:, None])
    for name, value in right.items():
        np.testing.assert_allclose(logged[name], value, rtol=1e-6, err_msg=name)
        np.testing.assert_allclose(logged[f"val_{name}"], value, rtol=1e-6, err_msg=name)
