"""A loss and a metric of the same step: what the loss has computed is used where both mean the same, and only there."""

import warnings

import keras
import numpy as np
import pytest

import keras_xent as kx
from keras_xent import _loss_statistics
from tests import oracles
from tests.backend import BACKEND, to_numpy
from tests.tiers import fast_for, whole

CLASSES = 50
METRICS = {
    "Perplexity": lambda **given: kx.metrics.Perplexity(name="m", **given),
    "TokenCrossentropy": lambda **given: kx.metrics.TokenCrossentropy(name="m", **given),
    "BitsPerByte": lambda **given: kx.metrics.BitsPerByte([1.0] * CLASSES, name="m", **given),
}
TO_NATS = {"Perplexity": np.log, "TokenCrossentropy": lambda x: x, "BitsPerByte": lambda x: x * np.log(2)}
rng = np.random.default_rng(0)
TOKENS = rng.integers(1, CLASSES, (8, 13)) * (np.arange(13) < rng.integers(4, 13, (8, 1)))
X, Y = TOKENS[:, :-1], TOKENS[:, 1:]


def language_model(head=keras.layers.Dense, mask_zero=False, **arguments):
    keras.utils.set_random_seed(1)
    embedding = keras.layers.Embedding(CLASSES, 8, mask_zero=mask_zero)
    model = keras.Sequential([keras.Input((12,)), embedding, head(CLASSES, kernel_initializer="normal", **arguments)])
    embedding.set_weights([np.random.default_rng(2).normal(size=(CLASSES, 8))])
    model.layers[-1].set_weights([10 * w for w in model.layers[-1].get_weights()])
    return model


def fitted(model, loss, metric, mode=None, **fit):
    model.compile(keras.optimizers.SGD(0.0), loss, metrics=[metric], **(mode or {}))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        value = model.fit(X, Y, verbose=0, epochs=2, **fit).history["m"][-1]
    return value, [w for w in caught if w.category is UserWarning]


def nll(logits):
    return oracles.sparse(Y.ravel(), to_numpy(logits).reshape(-1, CLASSES))[0].reshape(Y.shape)


@fast_for("Perplexity-auto")
@pytest.mark.parametrize("mode", [{}, {"run_eagerly": True}, {"jit_compile": True}], ids=["auto", "eager", "xla"])
@pytest.mark.parametrize("name", METRICS)
def test_a_metric_of_logits_does_not_repeat_a_forgotten_from_logits(name, mode):
    model = language_model()
    expected = nll(model(X)).mean()
    got, told = fitted(model, kx.losses.SparseCategoricalCrossentropy(), METRICS[name](), mode)
    np.testing.assert_allclose(TO_NATS[name](got), expected, rtol=1e-6)
    told = [w for w in told if "from_logits=True, and the loss SparseCategoricalCrossentropy" in str(w.message)]
    assert len(told) == 1 and told[0].filename == __file__


@fast_for("metric-auto-fused")
@pytest.mark.parametrize("head", [keras.layers.Dense, kx.layers.LogitsDense], ids=["dense", "fused"])
@pytest.mark.parametrize("mode", [{}, {"run_eagerly": True}], ids=["auto", "eager"])
@pytest.mark.parametrize("which", ["loss", "metric"])
def test_a_disagreement_about_ignore_class_is_told_once(which, mode, head):
    given = {"loss": {}, "metric": {}, which: {"ignore_class": 0}}
    loss = kx.losses.MaskedSequenceCrossentropy(**given["loss"])
    metric = kx.metrics.Perplexity(name="m", **given["metric"])
    model = language_model(head)
    losses = nll(model(X))
    got, told = fitted(model, loss, metric, mode)
    counted = Y != 0 if which == "metric" else Y == Y
    np.testing.assert_allclose(np.log(got), losses[counted].mean(), rtol=1e-6)
    told = [str(w.message) for w in told if "ignore_class" in str(w.message)]
    assert len(told) == 1 and "Perplexity" in told[0] and "MaskedSequenceCrossentropy" in told[0]


@whole
def test_padding_marked_by_weights_here_and_by_labels_there_is_no_disagreement():
    weights = (Y != 0).astype("float32")
    model = language_model()
    losses = nll(model(X))
    loss, metric = kx.losses.MaskedSequenceCrossentropy(), kx.metrics.Perplexity(ignore_class=0, name="m")
    got, told = fitted(model, loss, metric, sample_weight=weights)
    np.testing.assert_allclose(np.log(got), losses[Y != 0].mean(), rtol=1e-6)
    assert told == []


@whole
@pytest.mark.parametrize("head", [keras.layers.Dense, kx.layers.LogitsDense], ids=["dense", "fused"])
def test_a_metric_without_the_soft_cap_of_the_loss_has_none(head):
    model = language_model(head)
    expected = nll(model(X)).mean()
    got, told = fitted(model, kx.losses.MaskedSequenceCrossentropy(logit_softcap=2.0), METRICS["Perplexity"]())
    np.testing.assert_allclose(np.log(got), expected, rtol=1e-6)
    assert sum("logit_softcap=None, and the loss" in str(w.message) for w in told) == 1


class Inside(keras.losses.Loss):
    """A user's loss around ours."""

    def __init__(self, change=lambda x: x):
        super().__init__()
        self.base, self.change = kx.losses.MaskedSequenceCrossentropy(), change

    def call(self, y_true, y_pred):
        return self.base(y_true, self.change(y_pred))


@fast_for("of other logits")
@pytest.mark.parametrize("kind", ["function", "loss", "of other logits"])
def test_a_mask_counts_also_when_our_loss_is_inside_another(kind):
    ours = kx.losses.MaskedSequenceCrossentropy()
    loss = {
        "function": lambda y, p: ours(y, p),
        "loss": Inside(),
        "of other logits": Inside(lambda logits: 2.0 * logits),
    }[kind]
    model = language_model(mask_zero=True)
    expected = nll(model(X))[X != 0].mean()
    got, _ = fitted(model, loss, METRICS["Perplexity"]())
    np.testing.assert_allclose(np.log(got), expected, rtol=1e-6)


def test_a_metric_that_cannot_see_the_mask_says_so():
    model = language_model(mask_zero=True)
    masked = nll(model(X))[X != 0].mean()
    foreign = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    got, told = fitted(model, foreign, METRICS["Perplexity"]())
    if BACKEND == "tensorflow":
        np.testing.assert_allclose(np.log(got), masked, rtol=1e-6)
        assert told == []
    else:
        assert [str(w.message)[:41] for w in told] == ["Perplexity 'm' counts masked tokens: on J"]


@pytest.mark.parametrize("fused", [False, True], ids=["dense", "fused"])
def test_a_loss_computes_no_ranks_for_metrics_of_other_models(fused, monkeypatch):
    found = []

    def recorded(needed=_loss_statistics.needed_statistics):
        found.append(needed())
        return found[-1]

    monkeypatch.setattr(_loss_statistics, "needed_statistics", recorded)
    other, own = kx.metrics.TokenAccuracy(top_k=2), kx.metrics.TokenAccuracy(top_k=2)
    head = kx.layers.LogitsDense if fused else keras.layers.Dense
    model = keras.Sequential([keras.Input((3,)), head(3, kernel_initializer="identity")])
    x, y = np.array([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0]], "float32"), np.array([1, 2])
    for metrics, needs in ([kx.metrics.Perplexity()], False), ([own], True):
        found.clear()
        model.compile(
            keras.optimizers.SGD(0.0), kx.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=metrics
        )
        model.evaluate(x, y, verbose=0)
        model.fit(x, y, verbose=0)
        assert found and any("rank" in needed for needed in found) is needs
    assert model.evaluate(x, y, verbose=0)[1] == 0.5
    del other


@pytest.mark.skipif(BACKEND != "jax", reason="on TensorFlow no variable has to leave a gradient")
@pytest.mark.parametrize("keeps", [True, False], ids=["kept", "dropped"])
def test_a_step_of_ones_own_may_drop_the_metrics_variables_of_the_gradient(keeps):
    import jax

    model, metric, loss = language_model(), kx.metrics.Perplexity(), kx.losses.MaskedSequenceCrossentropy()
    variables = [*model.trainable_variables, *metric.variables]

    def loss_of(weights, state):
        with keras.StatelessScope(zip(variables, [*weights, *state], strict=True)) as scope:
            y_pred = model(X)
            return loss(Y, y_pred), (y_pred, [scope.get_current_value(one) for one in metric.variables])

    @jax.jit
    def step(weights, state):
        _, (y_pred, updated) = jax.grad(loss_of, has_aux=True)(weights, state)
        return metric.stateless_result(metric.stateless_update_state(updated if keeps else state, Y, y_pred))

    got = step(*[[one.value for one in some] for some in (model.trainable_variables, metric.variables)])
    np.testing.assert_allclose(np.log(to_numpy(got)), nll(model(X)).mean(), rtol=1e-6)
