"""Entropy and calibration error: float64 oracles, batches, masks, fused heads in `fit`; and temperature scaling."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_xent as kx
from keras_xent import calibration
from tests.backend import to_numpy
from tests.internals import set_keras_mask
from tests.tiers import fast_for, whole

RNG = np.random.default_rng(1)
LABELS = RNG.integers(0, 7, (40, 5))
LOGITS = (3 * RNG.standard_normal((40, 5, 7))).astype("float32")
MASK = RNG.random((40, 5)) < 0.7


def log_softmax(x):
    x = np.asarray(x, "float64")
    return x - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True)) - x.max(-1, keepdims=True)


def entropy(x):
    return -(np.exp(log_softmax(x)) * log_softmax(x)).sum(-1)


def calibration_error(confidence, hits, bins=15):
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    sums = [abs(confidence[place == b].sum() - hits[place == b].sum()) for b in range(bins)]
    return sum(sums) / len(confidence)


def of_tokens(x, labels, bins=15):
    p = np.exp(log_softmax(x))
    return calibration_error(p.max(-1), p.argmax(-1) == labels, bins)


def test_both_are_exact_over_batches_and_masks():
    metrics = [kx.metrics.Entropy(), kx.metrics.CalibrationError(bins=10)]
    for start, stop in ((0, 7), (7, 8), (8, 40)):
        logits = ops.convert_to_tensor(np.where(MASK[..., None], LOGITS, np.nan)[start:stop])
        set_keras_mask(logits, ops.convert_to_tensor(MASK[start:stop]))
        for metric in metrics:
            metric.update_state(LABELS[start:stop], logits)
    assert float(metrics[0].result()) == pytest.approx(entropy(LOGITS[MASK]).mean(), rel=1e-6)
    assert float(metrics[1].result()) == pytest.approx(of_tokens(LOGITS[MASK], LABELS[MASK], 10), rel=1e-6)
    for metric in metrics:
        metric.reset_state()
        assert np.isnan(float(metric.result()))


@whole
def test_probabilities_weights_and_a_class_axis():
    p = np.exp(log_softmax(LOGITS)).astype("float32")
    weights = MASK.astype("float32")
    for metric, expected in (
        (kx.metrics.Entropy(from_logits=False), entropy(LOGITS[MASK]).mean()),
        (kx.metrics.CalibrationError(from_logits=False), of_tokens(LOGITS[MASK], LABELS[MASK])),
    ):
        metric.update_state(LABELS, p, sample_weight=weights)
        assert float(metric.result()) == pytest.approx(expected, rel=1e-6)
    for kind in (kx.metrics.Entropy, kx.metrics.CalibrationError):
        last, first = kind(), kind(axis=1)
        last.update_state(LABELS, LOGITS)
        first.update_state(LABELS, np.moveaxis(LOGITS, -1, 1))
        assert float(first.result()) == pytest.approx(float(last.result()), rel=1e-6)


@pytest.mark.parametrize("shape", [(40,), (40, 1)])
def test_binary_classifiers(shape):
    logits = (2 * RNG.standard_normal(shape)).astype("float32")
    labels = RNG.integers(0, 2, 40)
    metric = kx.metrics.CalibrationError()
    for part in (slice(0, 9), slice(9, 40)):
        metric.update_state(labels[part], logits[part])
    probability = 1 / (1 + np.exp(-logits.reshape(-1).astype("float64")))
    assert float(metric.result()) == pytest.approx(calibration_error(probability, labels), rel=1e-6)
    confidence, hits, weight = metric.reliability()
    assert weight.sum() == 40 and (weight * hits).sum() == labels.sum()
    assert (weight * confidence).sum() == pytest.approx(probability.sum(), rel=1e-6)


def test_a_head_gives_them_in_fit_what_its_logits_give():
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.layers.Embedding(23, 8, mask_zero=True), kx.layers.LogitsDense(23, kernel_initializer="normal")]
    )
    tokens = np.where(MASK, RNG.integers(1, 23, MASK.shape), 0)
    metrics = [kx.metrics.Entropy(), kx.metrics.CalibrationError(), kx.metrics.Perplexity()]
    loss = kx.losses.MaskedSequenceCrossentropy()
    model.compile(keras.optimizers.SGD(0.0), loss, weighted_metrics=metrics)
    history = model.fit(tokens, LABELS, epochs=1, batch_size=16, verbose=0, shuffle=False).history
    logits = to_numpy(model(tokens))[MASK]
    assert history["entropy"][0] == pytest.approx(entropy(logits).mean(), rel=1e-6)
    assert history["calibration_error"][0] == pytest.approx(of_tokens(logits, LABELS[MASK]), rel=4e-6)
    evaluated = model.evaluate(tokens, LABELS, verbose=0, return_dict=True)
    assert evaluated["entropy"] == pytest.approx(history["entropy"][0], rel=1e-6)
    assert evaluated["calibration_error"] == pytest.approx(history["calibration_error"][0], rel=1e-5)


def test_a_bin_of_many_examples_is_summed_without_loss():
    """In float32, adding these one after the other gives an error that is 5 % too large."""
    confidence, hits = RNG.uniform(0.96, 0.999, 400_000), RNG.random(400_000) < 0.97
    logits = np.log(confidence / (1 - confidence)).astype("float32")
    metric = kx.metrics.CalibrationError()
    metric.update_state(hits.astype("int32"), logits)
    probability = 1 / (1 + np.exp(-logits.astype("float64")))
    assert float(metric.result()) == pytest.approx(calibration_error(probability, hits), rel=1e-6)
    share, of_hits, weight = (one[-1] for one in metric.reliability())
    assert (weight, weight * of_hits) == (400_000, hits.sum())
    assert share == pytest.approx(probability.mean(), rel=1e-7)


@pytest.mark.parametrize("metric", [kx.metrics.Entropy(ignore_class=-1), kx.metrics.CalibrationError(7, axis=1)])
def test_configurations_round_trip(metric):
    assert keras.metrics.deserialize(keras.metrics.serialize(metric)).get_config() == metric.get_config()


# Temperature scaling


def drawn(logits):
    return np.array([RNG.choice(logits.shape[-1], p=np.exp(row)) for row in log_softmax(logits)])


def identity(classes, fuse=False, scale=1.0):
    layer = (kx.layers.LogitsDense if fuse else keras.layers.Dense)(classes, kernel_initializer="identity")
    model = keras.Sequential([keras.Input((classes,)), layer])
    layer.kernel.assign(scale * np.eye(classes))
    return model


X = (2 * RNG.standard_normal((500, 7))).astype("float32")
Y = drawn(X)


def mean_nll(temperature, scale):
    return -np.take_along_axis(log_softmax(scale * X.astype("float64") / temperature), Y[:, None], 1).mean()


@fast_for("3.0-True")
@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("scale", [0.2, 3.0])
def test_the_temperature_is_the_minimum_of_the_cross_entropy(scale, fuse):
    found = kx.calibrate(identity(7, fuse, scale), [(X[:300], Y[:300]), (X[300:], Y[300:])], tolerance=1e-5)
    best = mean_nll(found, scale)
    assert best < min(mean_nll(found * factor, scale) for factor in (0.99, 1.01))
    slope = (mean_nll(found * (1 + 1e-4), scale) - mean_nll(found * (1 - 1e-4), scale)) / 2e-4
    assert abs(slope) < 1e-4
    assert found == pytest.approx(scale, rel=0.2)


def test_calibration_lowers_the_calibration_error_and_counts_only_what_is_valid():
    labels = np.where(np.arange(500) % 5 == 0, -1, Y)
    found = kx.calibrate(identity(7, scale=3.0), (X, labels), ignore_class=-1, batch_size=500)
    weighted = kx.calibrate(identity(7, scale=3.0), [(X, Y, (labels >= 0).astype("float32"))])
    assert found == pytest.approx(weighted, rel=1e-5)
    errors = []
    for temperature in (1.0, found):
        metric = kx.metrics.CalibrationError(ignore_class=-1)
        metric.update_state(labels, 3 * X / temperature)
        errors.append(float(metric.result()))
    assert errors[1] < 0.3 * errors[0]


@pytest.mark.parametrize("best", [500.0, 1 / 500])
def test_temperatures_near_the_limits_are_found(best):
    # A probability of 3 in 4, in 3 of 4 examples.
    x = np.tile(np.array([[best * np.log(3), 0.0]], "float32"), (4, 1))
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2, kernel_initializer="identity")])
    assert kx.calibrate(model, (x, np.array([0, 0, 0, 1]))) == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize("activation", [None, "sigmoid"])
def test_a_binary_classifier(activation):
    x = RNG.standard_normal((400, 1)).astype("float32")
    y = RNG.random(400) < 1 / (1 + np.exp(-2 * x[:, 0]))
    layer = keras.layers.Dense(1, activation, kernel_initializer="ones")
    found = kx.calibrate(keras.Sequential([keras.Input((1,)), layer]), (x, y.astype("int32")), batch_size=400)

    def nll(temperature):
        z = x[:, 0].astype("float64") / temperature
        return np.log1p(np.exp(np.where(y, -z, z))).mean()

    assert nll(found) < min(nll(found * factor) for factor in (0.99, 1.01))


@pytest.mark.parametrize("layer", [kx.layers.LogitsDense, keras.layers.Dense])
def test_a_binary_answer_for_each_token_counts_where_the_mask_says(layer):
    tokens = np.where(np.arange(6) < RNG.integers(1, 7, (60, 1)), RNG.integers(1, 9, (60, 6)), 0)
    ids = keras.Input((None,), dtype="int32")
    logits = layer(1)(keras.layers.Embedding(9, 4, "normal", mask_zero=True)(ids))
    model, mask = keras.Model(ids, logits), tokens != 0
    kernel = model.layers[-1].kernel
    kernel.assign(kernel * 3 / float(to_numpy(model(tokens))[mask].std()))
    z = to_numpy(model(tokens))[..., 0]
    y = (RNG.random(z.shape) < 1 / (1 + np.exp(-z / 2))).astype("int32")
    found = kx.calibrate(model, (tokens, np.where(mask, y, 7).tolist()), tolerance=1e-6)

    def nll(temperature):
        x = z[mask] / temperature
        return np.log1p(np.exp(np.where(y[mask] == 1, -x, x))).mean()

    assert nll(found) < min(nll(found * factor) for factor in (0.99, 1.01))
    # The same of its labels as a column, and with weights for the mask.
    plain = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, kernel_initializer="ones")])
    column = z.reshape(-1, 1).astype("float32"), y.reshape(-1, 1), mask.reshape(-1).astype("float32")
    assert kx.calibrate(plain, column, tolerance=1e-6) == pytest.approx(found, rel=1e-5)


def test_a_model_that_is_always_right_has_no_temperature():
    with pytest.warns(UserWarning, match="calibrate finds no best temperature"):
        assert kx.calibrate(identity(7), (X, X.argmax(1)), batch_size=500) == pytest.approx(1 / 1024)
    with pytest.raises(ValueError, match="`data` must hold valid labels"):
        kx.calibrate(identity(7), (X, np.full(500, -1)), ignore_class=-1)
    with pytest.warns(UserWarning, match="1024, where the logits say nothing of the labels"):
        assert kx.calibrate(identity(7), (X[:7], X[:7].argmin(1))) == pytest.approx(1024)


def test_calibrate_names_what_it_cannot_use():
    model, numbers = identity(7), X[:8].copy()
    with pytest.raises(ValueError, match=r"labels of shape \(8, 7\) .* give the indices: `numpy.argmax"):
        kx.calibrate(model, (numbers, np.eye(7)[Y[:8]]))
    numbers[3] = np.nan
    with pytest.raises(ValueError, match="`model` must return finite numbers for `data`. Received: NaN"):
        kx.calibrate(model, (numbers, Y[:8]))
    numbers[3] = np.where(np.arange(7) == Y[3], -np.inf, 0)
    with pytest.raises(ValueError, match="`model` must return finite numbers for `data`. Received: NaN or infinity"):
        kx.calibrate(keras.Sequential([keras.Input((7,)), keras.layers.Identity()]), (numbers, Y[:8]))
    for data, received in (
        (X[:8], "ndarray"),
        (None, "None"),
        (3, "int"),
        ((X[:8], None), "None for the labels"),
        ([X[:8]], "a batch of class ndarray"),
        ([(X[:8],)], r"a batch of 1 part\(s\)"),
        ([{"x": X[:8], "y": Y[:8]}], "a batch of class dict"),
        ([[[1.0, 2.0], [3.0]], [0, 1]], "a list of rows of uneven length"),
    ):
        with pytest.raises(ValueError, match=rf"`data` must be arrays `\(x, y\)`.*Received: {received}"):
            kx.calibrate(model, data)
    with pytest.raises(ValueError, match="`data` must have as many labels as examples. Received: 8 and 5."):
        kx.calibrate(model, (X[:8], Y[:5]))
    with pytest.raises(ValueError, match="`data` must have as many weights as examples. Received: 8 and 9."):
        kx.calibrate(model, (X[:8], Y[:8], np.ones(9)))
    with pytest.raises(ValueError, match="`batch_size` must be a whole number of at least 1"):
        kx.calibrate(model, (X[:8], Y[:8]), batch_size=0)
    with pytest.raises(ValueError, match="weights above 0. Received: weights with the sum -8.0"):
        kx.calibrate(model, (X[:8], Y[:8], -np.ones(8)))
    with pytest.raises(ValueError, match="`model` must be a Keras model. Received: None"):
        kx.calibrate(None, (X[:8], Y[:8]))


@pytest.mark.parametrize("number", [2, None])
def test_calibrate_takes_batches_by_index(number):
    class Batches(keras.utils.PyDataset):
        @property
        def num_batches(self):
            return number

        def __getitem__(self, index):
            return X[30 * index : 30 * index + 30], Y[30 * index : 30 * index + 30]

    model = identity(7, scale=3.0)
    if number is None:
        with pytest.raises(ValueError, match="`data` must be arrays .*Received: a PyDataset without an end."):
            kx.calibrate(model, Batches())
    else:
        expected = kx.calibrate(model, (X[:60], Y[:60]), batch_size=30)
        assert kx.calibrate(model, Batches()) == pytest.approx(expected, rel=1e-6)


@whole
def test_batches_may_be_lists_and_arrays_lists_of_numbers():
    model, whole = identity(7, scale=3.0), (X[:60], Y[:60])
    expected = kx.calibrate(model, whole, batch_size=30)
    assert kx.calibrate(model, [[X[:30], Y[:30]], [X[30:60], Y[30:60]]]) == pytest.approx(expected, rel=1e-6)
    assert kx.calibrate(model, [one.tolist() for one in whole], batch_size=30) == pytest.approx(expected, rel=1e-6)
    listed = [(X[i : i + 30].tolist(), Y[i : i + 30].tolist()) for i in (0, 30)]
    assert kx.calibrate(model, listed) == pytest.approx(expected, rel=1e-6)
    assert kx.calibrate(model, (one for one in listed)) == pytest.approx(expected, rel=1e-6)
    given = X[:60], tuple(Y[:60].tolist()), None
    assert kx.calibrate(model, given, batch_size=30) == pytest.approx(expected, rel=1e-6)


def test_binary_labels_that_are_none_are_refused_and_masks_count():
    metric = kx.metrics.CalibrationError()
    with pytest.raises(ValueError, match=r"`y_true` must be numbers from 0 to 1. Received: label 5 at position \(1,\)"):
        metric.update_state([0, 5], [0.3, 0.4])
    with pytest.raises(ValueError, match=r"one number from 0 to 1 for each number of `y_pred`.*\(3,\).*\(2, 1\)"):
        metric.update_state([0, 1, 1], [[0.3], [0.4]])
    # What has weight 0, or lies under the mask, may be anything, and so may the weight under the mask.
    logits = ops.convert_to_tensor(np.array([[[0.0], [1.0]], [[2.0], [9.0]]], "float32"))
    set_keras_mask(logits, ops.convert_to_tensor(np.array([[True, True], [True, False]])))
    metric.update_state([[1, 5], [0, 7]], logits, [[1.0, 0.0], [2.0, float("nan")]])
    expected = (0.5 + 2 / (1 + np.exp(-2.0))) / 3
    assert float(metric.result()) == pytest.approx(expected, rel=1e-6)


@fast_for("10-*", "4-1.0-*")
@pytest.mark.parametrize("bins, probability, place", [(4, 0.5, 2), (10, 0.9, 9), (5, 0.6, 3), (4, 1.0, 3), (1, 0.5, 0)])
def test_a_confidence_at_an_edge_belongs_to_the_bin_above(bins, probability, place):
    metric = kx.metrics.CalibrationError(bins, from_logits=False)
    metric.update_state([0], [[probability, 1 - probability]])
    assert np.argmax(metric.reliability()[2]) == place


@fast_for("Entropy")
@pytest.mark.parametrize("kind", [kx.metrics.Entropy, kx.metrics.CalibrationError, kx.metrics.Perplexity])
def test_predictions_may_be_lists(kind):
    listed, given = kind(), kind()
    listed.update_state(LABELS.tolist(), LOGITS.tolist())
    given.update_state(LABELS, LOGITS)
    # Their sums may have another order.
    assert float(listed.result()) == pytest.approx(float(given.result()), rel=2e-7)


def capped_head(dtype):
    """A head over an identity, its logits capped to 2."""
    layer, hidden = kx.layers.TiedLogits(7, 7, logit_soft_cap=2.0, dtype=dtype), keras.Input((7,))
    model = keras.Model(hidden, layer(hidden, reverse=True))
    layer.set_weights([np.eye(7)])
    return model


def biased_head(dtype):
    layer = kx.layers.LogitsDense(7, kernel_initializer="identity", bias_initializer="ones", dtype=dtype)
    return keras.Sequential([keras.Input((7,)), layer])


@pytest.mark.parametrize(
    "head, dtype",
    [(biased_head, "mixed_bfloat16"), (biased_head, "mixed_float16"), (capped_head, "float32")],
    ids=["bfloat16", "float16", "capped"],
)
def test_a_temperature_is_no_option_of_a_program(head, dtype, monkeypatch):
    """Each new one would be compiled for seconds."""
    rules, columns = set(), calibration.token_columns
    monkeypatch.setattr(calibration, "token_columns", lambda *a, **k: rules.add(a[0]) or columns(*a, **k))
    rounded = to_numpy(ops.cast(X, dtype.removeprefix("mixed_"))).astype("float32")
    found = kx.calibrate(head(dtype), (rounded, Y), batch_size=500)
    assert len(rules) == 1
    logits = 2 * np.tanh(rounded / 2) if head is capped_head else rounded
    assert found == pytest.approx(kx.calibrate(identity(7), (logits, Y), batch_size=500), rel=1e-5)
