"""Log-probabilities under models: without logits where the output layer allows it, equal to those from logits."""

import threading

import keras
import numpy as np
import pytest
from keras import ops

import keras_xent as kx
from keras_xent import _without_logits
from tests.backend import BACKEND, MODES, every_mode, tensor, to_numpy
from tests.tiers import fast_for

VOCABULARY, WIDTH, LENGTH = 31, 8, 5
Functional = type(keras.models.clone_model(keras.Model(*[keras.Input((1,))] * 2)))
RNG = np.random.default_rng(3)
TOKENS = RNG.integers(1, VOCABULARY, (4, LENGTH)).astype("int32")
LABELS = RNG.integers(1, VOCABULARY, (4, LENGTH)).astype("int32")
MASK = np.arange(LENGTH) < np.array([5, 3, 1, 0])[:, None]


class OfStructure(keras.Model):
    """A model that returns its logits inside a structure, and perhaps more."""

    def __init__(self, structure):
        super().__init__()
        self.embedding, self.head = keras.layers.Embedding(VOCABULARY, WIDTH), kx.layers.LogitsDense(VOCABULARY)
        self.structure = structure

    def call(self, x):
        return self.structure(self.head(self.embedding(x)))


class Subclassed(keras.Model):
    """A model that returns what its head returns, or something made from it."""

    def __init__(self, scale=None, head=kx.layers.LogitsDense):
        super().__init__()
        self.embedding, self.head = keras.layers.Embedding(VOCABULARY, WIDTH), head(VOCABULARY)
        self.scale = scale

    def call(self, x):
        logits = self.head(self.embedding(x))
        return logits if self.scale is None else logits * self.scale[: logits.shape[-1]]


def doubled(kind, method="call"):
    """A subclass of a layer or model whose logits are doubled."""

    def method_of_subclass(self, inputs, *args, **kwargs):
        return 2 * getattr(kind, method)(self, inputs, *args, **kwargs)

    return type(f"Doubled{kind.__name__}", (kind,), {method: method_of_subclass})


def functional(kind, head=keras.layers.Dense):
    tokens = keras.Input((None,), dtype="int32")
    return kind(tokens, head(VOCABULARY)(keras.layers.Embedding(VOCABULARY, WIDTH)(tokens)))


def tied():
    embedding = kx.layers.TiedLogits(VOCABULARY, WIDTH, logit_soft_cap=2.0)
    tokens = keras.Input((None,), dtype="int32")
    return keras.Model(tokens, embedding(embedding(tokens), reverse=True))


def adapted():
    """A model whose head has factors of rank 2 added to its kernel, which is not trained."""
    model = sequential(kx.layers.LogitsDense(VOCABULARY))
    model(TOKENS)
    model.layers[-1].enable_lora(2)
    model.layers[-1].lora_kernel_b.assign(np.random.default_rng(5).standard_normal((2, VOCABULARY)))
    return model


def sequential(*last, kind=keras.Sequential):
    return kind([keras.layers.Embedding(VOCABULARY, WIDTH, mask_zero=True), *last])


MODELS = {
    "LogitsDense": lambda: sequential(kx.layers.LogitsDense(VOCABULARY)),
    "plain Dense": lambda: sequential(keras.layers.Dense(VOCABULARY), keras.layers.Activation("linear")),
    "Dense with softmax": lambda: sequential(keras.layers.Dense(VOCABULARY, activation="softmax")),
    "TiedLogits": tied,
    "LoRA": adapted,
    "fused": lambda: kx.fuse_head(sequential(keras.layers.Dense(VOCABULARY))),
    "subclassed": Subclassed,
    "subclassed, scaled": lambda: Subclassed(np.linspace(0.5, 2, VOCABULARY).astype("float32")),
    "Functional with its own call": lambda: functional(doubled(Functional)),
    "Sequential with its own call": lambda: sequential(
        kx.layers.LogitsDense(VOCABULARY), kind=doubled(keras.Sequential)
    ),
    "model with its own call inside": lambda: keras.Sequential([functional(doubled(Functional))]),
    "Dense with its own call": lambda: sequential(doubled(keras.layers.Dense)(VOCABULARY)),
    "Dense with its own __call__": lambda: sequential(doubled(keras.layers.Dense, "__call__")(VOCABULARY)),
    "LogitsDense with its own call": lambda: Subclassed(head=doubled(kx.layers.LogitsDense)),
    "in a dict": lambda: OfStructure(lambda logits: {"logits": logits}),
    "softmax layer": lambda: keras.Sequential(
        [keras.layers.Embedding(VOCABULARY, WIDTH), keras.layers.Dense(VOCABULARY), keras.layers.Softmax()]
    ),
}


def built(name):
    keras.utils.set_random_seed(1)
    model = MODELS[name]()
    model(TOKENS)
    return model


def from_predictions(model, temperature=1.0, probabilities=False):
    x = to_numpy(keras.tree.flatten(model(TOKENS))[0])
    x = np.log(x) if probabilities else x
    x = x / temperature
    log_p = x - np.log(np.exp(x).sum(-1, keepdims=True))
    return np.take_along_axis(log_p, LABELS[..., None], -1)[..., 0]


@pytest.mark.parametrize("name", MODELS)
def test_log_probabilities_are_those_from_the_predictions(name):
    model = built(name)
    expected = from_predictions(model, 1.7, "softmax" in name)
    mine = kx.token_log_probs(model, TOKENS, LABELS, mask=MASK, temperature=1.7)
    np.testing.assert_allclose(to_numpy(mine), np.where(MASK, expected, 0), atol=2e-6)
    total = to_numpy(kx.sequence_log_probs(model, TOKENS, LABELS, mask=MASK, temperature=1.7))
    np.testing.assert_allclose(total, np.where(MASK, expected, 0).sum(1), atol=4e-6)
    mean = to_numpy(kx.sequence_log_probs(model, TOKENS, LABELS, mask=MASK, temperature=1.7, normalize=True))
    np.testing.assert_allclose(mean, total / np.maximum(MASK.sum(1), 1), atol=1e-6)
    # The model is what it was.
    np.testing.assert_allclose(from_predictions(model, 1.7, "softmax" in name), expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_temperature_rounds_no_logits(dtype):
    head = keras.layers.Dense(VOCABULARY, kernel_initializer=keras.initializers.RandomNormal(stddev=30.0), dtype=dtype)
    model = sequential(head, keras.layers.Identity(dtype=dtype))
    expected = from_predictions(model, 1.7)
    found = to_numpy(kx.token_log_probs(model, TOKENS, LABELS, temperature=1.7))
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=2e-6)


@every_mode
@pytest.mark.parametrize("name", ["softmax layer", "subclass with a softmax", "subclass with a softmax in its head"])
def test_a_softmax_is_undone_in_every_mode(name, mode):
    """Of what JAX traces only the layers of the model and the program tell; of its eager tensors only the values."""
    activation = "softmax" if name.endswith("head") else None
    model = built(name) if name in MODELS else EndsInSoftmax(activation)
    expected = from_predictions(model, 1.7, probabilities=True)
    mine = MODES[mode](lambda tokens: kx.token_log_probs(model, tokens, LABELS, temperature=1.7))(tensor(TOKENS))
    np.testing.assert_allclose(to_numpy(mine), expected, atol=2e-6)


class EndsInSoftmax(keras.Model):
    """A subclassed model that returns probabilities, of a layer or of an operation."""

    def __init__(self, activation):
        super().__init__()
        self.embedding = keras.layers.Embedding(VOCABULARY, WIDTH)
        self.dense = keras.layers.Dense(VOCABULARY, activation=activation)

    def call(self, x):
        output = self.dense(self.embedding(x))
        return output if self.dense.activation is keras.activations.softmax else ops.softmax(output)


@pytest.mark.parametrize(
    "feed", [lambda x: x, lambda x: ops.max(x, axis=-1, keepdims=True)], ids=["all", "the largest"]
)
def test_a_head_that_is_called_again_with_its_own_logits_is_what_it_is(feed):
    """What a later call gets would be computed from the stand-in for the logits of an earlier one."""
    head = kx.layers.LogitsDense(WIDTH)

    class Twice(keras.Model):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = keras.layers.Embedding(VOCABULARY, WIDTH), head

        def call(self, x):
            hidden = self.embedding(x)
            return self.head(hidden + feed(self.head(hidden)))

    tokens = keras.Input((None,), dtype="int32")
    hidden = keras.layers.Embedding(VOCABULARY, WIDTH)(tokens)
    labels = LABELS % WIDTH
    for model in (Twice(), keras.Model(tokens, head(hidden + feed(head(hidden))))):
        logits = to_numpy(model(TOKENS))
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        expected = np.take_along_axis(log_p, labels[..., None], -1)[..., 0]
        np.testing.assert_allclose(to_numpy(kx.token_log_probs(model, TOKENS, labels)), expected, atol=2e-6)


@fast_for("LogitsDense", "subclassed")
@pytest.mark.parametrize("name", ["LogitsDense", "plain Dense", "TiedLogits", "fused", "subclassed"])
def test_the_output_layer_is_not_called(name):
    model = built(name)
    kinds = (keras.layers.Dense, keras.layers.ReversibleEmbedding)
    (layer,) = (one for one in model.layers if isinstance(one, kinds))
    call, shapes = layer.call, []

    def recorded(*args, **kwargs):
        result = call(*args, **kwargs)
        shapes.append(tuple(result.shape))
        return result

    object.__setattr__(layer, "call", recorded)
    model(TOKENS)
    assert shapes[-1] == (4, LENGTH, VOCABULARY)
    shapes.clear()
    kx.token_log_probs(model, TOKENS, LABELS)
    assert (4, LENGTH, VOCABULARY) not in shapes
    # The layer is called again as it was.
    assert vars(layer)["call"] is recorded


def test_the_keras_mask_of_the_model_counts():
    model, padded = built("LogitsDense"), np.where(MASK, TOKENS, 0)
    log_probs = to_numpy(kx.token_log_probs(model, padded, LABELS))
    assert (log_probs[~MASK] == 0).all() and (log_probs[MASK] < 0).all()


def values_and_gradients(model, function, compiled):
    """What `function` of the model's weights returns, a pair, and the gradients of its first result for each weight."""
    if BACKEND == "tensorflow":
        import tensorflow as tf

        def step():
            with tf.GradientTape() as tape:
                returned = function()
            return returned, tape.gradient(returned[0], [v.value for v in model.trainable_variables])

        returned, slopes = compiled(step)()
    else:
        import jax

        def step(values):
            mapping = list(zip(model.trainable_variables, values, strict=True))
            with keras.StatelessScope(state_mapping=mapping, collect_losses=True):
                return function()

        values = [v.value for v in model.trainable_variables]
        returned, slopes = compiled(jax.value_and_grad(step, has_aux=True))(values)
    return [to_numpy(one) for one in returned], [to_numpy(ops.convert_to_tensor(one)) for one in slopes]


@fast_for("TiedLogits")
@pytest.mark.parametrize("name", ["LogitsDense", "TiedLogits"])
def test_gradients_reach_every_weight(name):
    model = built(name)

    def function():
        log_probs = kx.sequence_log_probs(model, TOKENS, LABELS, mask=MASK)
        return ops.sum(log_probs), log_probs

    if BACKEND == "tensorflow":
        import tensorflow as tf

        compiler = tf.function  # with AutoGraph
    else:
        compiler = MODES["jit"]
    eager, compiled = (values_and_gradients(model, function, how)[1] for how in (MODES["eager"], compiler))
    for one, other in zip(eager, compiled, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)
        assert np.abs(one).max() > 0
    # Against differences of values in one direction.
    weights = model.get_weights()
    direction = [RNG.standard_normal(w.shape) for w in weights]
    values = []
    for sign in (1, -1):
        model.set_weights([w + sign * 1e-2 * d for w, d in zip(weights, direction, strict=True)])
        values.append(to_numpy(kx.sequence_log_probs(model, TOKENS, LABELS, mask=MASK)).sum())
    slope = sum((g * d).sum() for g, d in zip(eager, direction, strict=True))
    np.testing.assert_allclose((values[0] - values[1]) / 2e-2, slope, rtol=1e-3)


def test_a_preference_loss_trains_in_fit():
    class Preferences(keras.Model):
        def __init__(self, policy):
            super().__init__()
            self.policy = policy

        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
            chosen, rejected = (kx.sequence_log_probs(self.policy, x, y[:, i], training=training) for i in (0, 1))
            return ops.mean(kx.preference.simpo(chosen, rejected, gamma=0.0))

        def call(self, x):
            return self.policy(x)

    policy = built("LogitsDense")
    model = Preferences(policy)
    model.compile(keras.optimizers.Adam(0.05))
    pairs = np.stack([LABELS, (LABELS + 7) % VOCABULARY], axis=1)
    losses = model.fit(TOKENS, pairs, epochs=15, verbose=0, batch_size=4).history["loss"]
    assert losses[-1] < 0.1 * losses[0]


def test_nested_lists_are_arrays():
    model = built("LogitsDense")
    x, labels, mask = (array.tolist() for array in (TOKENS, LABELS, MASK))
    of_arrays = kx.token_log_probs(model, TOKENS, LABELS, mask=MASK)
    np.testing.assert_array_equal(kx.token_log_probs(model, x, labels, mask=mask), of_arrays)
    arrays = {"x": TOKENS[None], "labels": LABELS[None], "mask": MASK[None]}
    lists = {name: array.tolist() for name, array in arrays.items()}
    found, expected = (
        kx.sequence_loss(model, **one, loss=lambda *log_probs: sum(log_probs)) for one in (lists, arrays)
    )
    np.testing.assert_array_equal(found, expected)


def test_wrong_arguments_are_named():
    model = built("LogitsDense")
    with pytest.raises(ValueError, match="`temperature` must be a number above 0"):
        kx.token_log_probs(model, TOKENS, LABELS, temperature=-1)
    with pytest.raises(ValueError, match="`labels` must have the shape"):
        kx.token_log_probs(model, TOKENS, LABELS[:, 1:])
    with pytest.raises(ValueError, match=r"label -1 at position .* If it marks padding, leave it out with `mask`\."):
        kx.token_log_probs(model, TOKENS, np.where(MASK, LABELS, -1))
    one_hot = np.eye(VOCABULARY)[LABELS]
    with pytest.raises(ValueError, match=r"and logits of shape \(4, 5, 31\) .* give the indices: `numpy.argmax"):
        kx.token_log_probs(model, TOKENS, one_hot)


@pytest.mark.parametrize(
    "make, sentence",
    [
        (lambda: OfStructure(lambda logits: (logits, logits[..., :1])), "one output, .* with 2 outputs"),
        (lambda: two_heads(kx.layers.LogitsDense), "one output, .* with 2 outputs"),
        (lambda: two_heads(keras.layers.Dense), "one output, .* with 2 outputs"),
        (lambda: sequential(keras.layers.Dense(VOCABULARY, activation="sigmoid")), "Received: a sigmoid of 31 units"),
        (lambda: sequential(keras.layers.Dense(1)), "Received: one unit"),
        (lambda: sequential(keras.layers.Dense(1, activation="sigmoid")), "Received: one unit"),
    ],
)
def test_models_without_one_output_of_classes_are_refused(make, sentence):
    with pytest.raises(ValueError, match="`model` must .*" + sentence):
        kx.token_log_probs(make(), TOKENS, LABELS)


def two_heads(layer):
    tokens = keras.Input((None,), dtype="int32")
    hidden = keras.layers.Embedding(VOCABULARY, WIDTH)(tokens)
    return keras.Model(tokens, {"next": layer(VOCABULARY)(hidden), "value": keras.layers.Dense(1)(hidden)})


def test_the_keras_mask_of_a_single_output_in_a_list_counts():
    model, padded = built("LogitsDense"), np.where(MASK, TOKENS, 0)
    listed = keras.Model(model.inputs, [model.outputs[0]])
    np.testing.assert_array_equal(
        to_numpy(kx.token_log_probs(listed, padded, LABELS)), to_numpy(kx.token_log_probs(model, padded, LABELS))
    )


@pytest.mark.parametrize("name", ["plain Dense", "TiedLogits", "subclassed"])
def test_two_threads_call_one_model(name):
    """One asks for log-probabilities, and the other gets the logits of the very same layers meanwhile."""
    model = built(name)
    logits, log_probs = to_numpy(model(TOKENS)), to_numpy(kx.token_log_probs(model, TOKENS, LABELS))
    head, wrong, stop = _without_logits.output_layer(model) or model.head, [], threading.Event()

    def look():
        while not stop.is_set():
            found = to_numpy(model(TOKENS))
            if found.shape != logits.shape or not np.allclose(found, logits, rtol=1e-5, atol=1e-6):
                wrong.append(found.shape)

    own, thread = vars(head).get("call"), threading.Thread(target=look)
    thread.start()
    try:
        for _ in range(10):
            np.testing.assert_allclose(to_numpy(kx.token_log_probs(model, TOKENS, LABELS)), log_probs, rtol=1e-6)
    finally:
        stop.set()
        thread.join()
    assert not wrong
    # Nothing is left on the layer.
    assert vars(head).get("call") is own


def test_other_threads_get_logits_while_one_does_without():
    model = built("plain Dense")
    layer = _without_logits.output_layer(model)
    shapes = []
    with _without_logits._heads_of([layer], model) as found:
        thread = threading.Thread(target=lambda: shapes.append(tuple(model(TOKENS).shape)))
        thread.start()
        thread.join()
        assert not found
        model(TOKENS)
    assert shapes == [(*TOKENS.shape, VOCABULARY)] and len(found) == 1 and "call" not in vars(layer)
