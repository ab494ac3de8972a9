"""LoRA on a head: the factors train as those of Keras' own layer, and the kernel's gradient is never formed."""

import warnings

import keras
import numpy as np
import pytest
from keras import ops

import keras_xent as kx
from tests.backend import BACKEND, MODES, TWO_MODES, skip_on_accelerator, to_numpy, with_gradients
from tests.tiers import fast_for, whole

TOKENS = np.random.default_rng(0).integers(1, 20, (4, 6))
RNG = np.random.default_rng(1)


def gradients(function, *arrays):
    """The gradients of a scalar function for each of the arrays."""
    return with_gradients(lambda *arrays: (function(*arrays), ()))(*arrays)[1]


def dense():
    model = keras.Sequential([keras.layers.Embedding(20, 5), kx.layers.LogitsDense(20)])
    model.build((None, 6))
    return model, model.layers[-1]


def tied():
    embedding = kx.layers.TiedLogits(20, 5)
    tokens = keras.Input((6,), dtype="int32")
    return keras.Model(tokens, embedding(embedding(tokens), reverse=True)), embedding


def with_lora(build):
    """A model whose head has LoRA, with factors that are not zero."""
    keras.utils.set_random_seed(0)
    model, head = build()
    head.enable_lora(2, lora_alpha=3)
    for weight in head.trainable_weights:
        weight.assign(RNG.standard_normal(weight.shape))
    return model, head


@fast_for("tied")
@pytest.mark.parametrize("build", [dense, tied])
def test_factors_train_as_those_of_keras_and_no_gradient_of_the_kernel_is_formed(build, formed):
    after = []
    for loss in (
        kx.losses.SparseCategoricalCrossentropy(from_logits=True),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    ):
        model, head = with_lora(build)
        for weight, seed in zip(head.trainable_weights, range(9), strict=False):
            weight.assign(np.random.default_rng(seed).standard_normal(weight.shape))
        model.compile(keras.optimizers.SGD(0.1), loss)
        history = model.fit(TOKENS, TOKENS, epochs=2, verbose=0, batch_size=4).history
        after.append([*history["loss"], *map(to_numpy, model.weights)])
    for ours, theirs in zip(*after, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-6, atol=2e-6)
    assert "factor" in formed and "kernel" not in formed


QUANTIZED = {
    "int8": keras.quantizers.Int8QuantizationConfig(),
    "int4": keras.quantizers.Int4QuantizationConfig(block_size=-1),
    "groups": keras.quantizers.Int4QuantizationConfig(block_size=4),
}


@fast_for("dense-int8")
@pytest.mark.parametrize("config", QUANTIZED)
@pytest.mark.parametrize("build", [dense, tied])
def test_factors_of_a_quantized_head_train_as_those_of_keras(build, config, formed):
    """Logits of a quantized `ReversibleEmbedding` have no LoRA in Keras; its embeddings have."""
    if config == "int8":
        skip_on_accelerator("Keras' product of int8 matrices is another number there (1 %, JAX 0.11 on an H100)")
    after = []
    for loss in (
        kx.losses.SparseCategoricalCrossentropy(from_logits=True),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    ):
        model, head = with_lora(build)
        head.quantize(QUANTIZED[config].mode, type_check=False, config=QUANTIZED[config])
        for weight, seed in zip(model.trainable_weights, range(9), strict=False):
            weight.assign(np.random.default_rng(seed).standard_normal(weight.shape))
        model.compile(keras.optimizers.SGD(0.1), loss)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*materializ")
            history = model.fit(TOKENS, TOKENS, epochs=1 if build is tied else 2, verbose=0, batch_size=4).history
        after.append([*history["loss"], *map(to_numpy, model.weights)])
    # Keras' int8 logits have no gradient for the inputs of a `ReversibleEmbedding`.
    compared = slice(1 if build is tied and config == "int8" else None)
    for ours, theirs in zip(after[0][compared], after[1][compared], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-6, atol=2e-6)
    assert formed == ({"hidden"} if build is tied else {"hidden", "bias", "projected", "factor"})


def test_what_lies_under_a_mask_reaches_no_factor_of_a_quantized_head():
    rng = np.random.default_rng(2)
    inputs = rng.standard_normal((1, 4, 5)).astype("float32")
    found = []
    for hidden in (0.0, np.nan):
        keras.utils.set_random_seed(0)
        inputs[0, 2] = hidden
        head = kx.layers.LogitsDense(20, use_bias=False)
        head.build((None, None, 5))
        head.enable_lora(2, b_initializer="normal")
        head.quantize("int8")
        loss = kx.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=-1)

        def value(first, second, head=head, loss=loss):
            logits = head.stateless_call([first, second], [w.value for w in head.non_trainable_variables], inputs)[0]
            return loss(np.array([[1, 2, -1, 3]]), logits)

        factors = [w.value for w in (head.lora_kernel_a, head.lora_kernel_b)]
        # Eager logits are computed in any case, and so is their gradient.
        found.append(gradients(MODES[TWO_MODES[1]](value), *factors))
    for one, other in zip(*found, strict=True):
        assert np.abs(to_numpy(one)).max() > 0
        np.testing.assert_array_equal(to_numpy(one), to_numpy(other))


@whole
@pytest.mark.parametrize("build", [dense, tied])
def test_a_frozen_head_forms_no_gradient_of_its_kernel(build, formed):
    model, head = build()
    if build is tied:
        # The embedding is the one layer there is.
        hidden = keras.layers.Dense(5)
        model = keras.Model(model.inputs, head(hidden(head(model.inputs[0])), reverse=True))
    head.trainable = False
    model.compile("sgd", kx.losses.SparseCategoricalCrossentropy(from_logits=True))
    before = [to_numpy(w) for w in head.weights]
    model.fit(TOKENS, TOKENS, verbose=0)
    assert formed == {"hidden"}
    for old, new in zip(before, head.weights, strict=True):
        np.testing.assert_array_equal(old, to_numpy(new))
    # Log-probabilities that a policy is trained by are no exception.
    formed.clear()
    step = model.layers[-2].weights[0]

    def total(weights):
        with keras.StatelessScope([(step, weights)]):
            return ops.sum(kx.token_log_probs(model, TOKENS, TOKENS))

    (gradient,) = gradients(total, step.value)
    assert np.abs(to_numpy(gradient)).max() > 0
    assert formed == {"hidden"}


@pytest.mark.whole
@pytest.mark.parametrize("transpose", [False, pytest.param(True, marks=pytest.mark.whole)])
def test_the_kernel_is_that_of_the_merged_kernel(transpose):
    hidden, labels = RNG.standard_normal((7, 5)), RNG.integers(0, 20, 7)
    kernel, first, second = (RNG.standard_normal(s) for s in ((5, 20), (5, 2), (2, 20)))
    if transpose:
        kernel, first, second = kernel.T, second.T, first.T
    dtype, rtol = ("float64", 1e-9) if BACKEND == "tensorflow" else ("float32", 5e-6)
    arrays = tuple(ops.convert_to_tensor(a, dtype=dtype) for a in (hidden, kernel, first, second))
    options = {"transpose_kernel": transpose, "mask": np.arange(7) != 3}

    def loss(low_rank):
        def of(hidden, kernel, first, second):
            if low_rank:
                factors = {"low_rank": (first, second)}
            else:
                factors, kernel = {}, kernel + ops.matmul(first, second)
            nll = kx.kernels.linear_cross_entropy(hidden, kernel, labels, **options, **factors, reduction="token_mean")
            found = kx.kernels.linear_token_statistics(hidden, kernel, labels, **options, **factors)
            return nll + ops.sum(found.entropy * found.log_prob)

        return of

    for ours, merged in zip(gradients(loss(True), *arrays), gradients(loss(False), *arrays), strict=True):
        np.testing.assert_allclose(to_numpy(ours), to_numpy(merged), rtol=rtol, atol=rtol)


def test_factors_that_do_not_fit():
    with pytest.raises(ValueError, match=r"`low_rank` must hold two factors .* Received: factors of shapes \(5, 2\)"):
        kx.kernels.linear_cross_entropy(np.ones((1, 5)), np.ones((5, 9)), [0], low_rank=(np.ones((5, 2)),) * 2)
