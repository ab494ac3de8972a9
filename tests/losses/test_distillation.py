"""Distillation as a loss and for Keras' Distiller: closed forms, masks, and no logits where heads are known."""

import keras
import numpy as np
import pytest

import keras_xent as kx
from keras_xent import _accumulation
from keras_xent.losses import distillation as module
from tests import internals
from tests.backend import BACKEND, MODES, tensor, to_numpy, value_and_gradient
from tests.tiers import fast_for, whole

RNG = np.random.default_rng(2)
TEACHER, STUDENT = RNG.standard_normal((2, 3, 4, 7)).astype("float32")
MASK = np.arange(4) < np.array([4, 2, 1])[:, None]


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_the_value_where_keras_default_is_wrong():
    teacher, student = np.array([[2.0, 0.0, -3.0]], "float32"), np.array([[-1.0, 4.0, 0.0]], "float32")
    loss = kx.distillation.LogitsDistillation(temperature=2.0)
    value, gradient = value_and_gradient(lambda x: loss.compute_loss(teacher, x), tensor(student))
    assert float(value) == pytest.approx(5.0694118, abs=1e-5)
    expected = 2 * (softmax(student.astype("float64") / 2) - softmax(teacher.astype("float64") / 2))
    np.testing.assert_allclose(gradient, expected, atol=1e-6)


@fast_for("forward_kl")
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jensen_shannon"])
def test_from_logits_it_is_the_linear_kernel_with_an_identity(divergence):
    loss = kx.losses.Distillation(1.5, divergence, beta=0.3, reduction="none")
    identity = np.eye(7, dtype="float32")

    def linear(x):
        options = {"temperature": 1.5, "divergence": divergence, "beta": 0.3}
        return kx.kernels.linear_distillation(x, identity, TEACHER, identity, **options)

    for one, other in zip(
        value_and_gradient(lambda x: loss(TEACHER, x), tensor(STUDENT)),
        value_and_gradient(linear, tensor(STUDENT)),
        strict=True,
    ):
        np.testing.assert_allclose(one, other, atol=2e-6)
    np.testing.assert_allclose(to_numpy(loss.call(TEACHER, STUDENT)), to_numpy(loss(TEACHER, STUDENT)), atol=1e-6)


def test_weights_and_reductions():
    losses = to_numpy(kx.losses.Distillation(reduction="none")(TEACHER, STUDENT))
    weights = np.where(MASK, 2.0, 0).astype("float32")
    spoiled = np.where(MASK[..., None], STUDENT, np.nan)
    value, gradient = value_and_gradient(
        lambda x: kx.losses.Distillation(reduction="token_mean")(TEACHER, x, weights), tensor(spoiled)
    )
    assert float(value) == pytest.approx(losses[MASK].mean(), rel=1e-6)
    assert (gradient[~MASK] == 0).all()
    mean = kx.losses.Distillation()(TEACHER, STUDENT)
    assert float(mean) == pytest.approx(losses.mean(), rel=1e-6)


@pytest.mark.parametrize("loss", [kx.losses.Distillation(), kx.distillation.LogitsDistillation()._loss])
def test_one_class_is_refused_whose_loss_is_always_0(loss):
    with pytest.raises(ValueError, match=r"`y_pred` must have two classes or more.*Received: shape \(3, 1\)"):
        loss(np.array([[3.0], [-2.0], [0.5]]), np.zeros((3, 1), "float32"))


@pytest.mark.parametrize("without_limit", [[np.inf, 0, np.inf], [-np.inf] * 3], ids=["two of +inf", "all -inf"])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jensen_shannon"])
def test_a_row_without_a_limit_has_the_loss_nan(divergence, without_limit):
    rows, others = np.array([without_limit, [1, 0, 2]], "float32"), np.array([[0, 1, 2]] * 2, "float32")
    loss = kx.losses.Distillation(2.0, divergence, reduction="none")
    for teacher, student in ((rows, others), (others, rows)):
        losses, gradient = value_and_gradient(lambda x, teacher=teacher: loss(teacher, x), tensor(student))
        assert np.isnan(losses).tolist() == [True, False]
        assert np.isnan(gradient).tolist() == [[True] * 3, [False] * 3]


@pytest.mark.parametrize("name, divergence", [("teacher", "forward_kl"), ("student", "reverse_kl")])
def test_one_logit_of_infinity_has_all_the_probability(name, divergence):
    sure, other = np.array([[np.inf, 0, 1]], "float32"), np.log(np.array([[0.25, 0.5, 0.25]], "float32"))
    teacher, student = (sure, other) if name == "teacher" else (other, sure)
    assert float(kx.losses.Distillation(divergence=divergence)(teacher, student)) == pytest.approx(np.log(4), rel=1e-6)


@pytest.mark.parametrize("student, teacher", [("bfloat16", "float32"), ("float16", "float32"), ("float32", "bfloat16")])
def test_teacher_and_student_are_read_in_their_own_dtypes(student, teacher):
    x, y = tensor(20 * STUDENT, student), tensor(20 * TEACHER, teacher)
    own, wide = kx.losses.Distillation(4.0)(y, x), kx.losses.Distillation(4.0)(tensor(to_numpy(y)), tensor(to_numpy(x)))
    assert float(own) == pytest.approx(float(wide), rel=2e-6)


def test_configurations_round_trip():
    loss = kx.losses.Distillation(2.0, "jensen_shannon", beta=0.2, reduction="token_mean", name="d", dtype="float32")
    again = keras.losses.deserialize(keras.losses.serialize(loss))
    assert again.get_config() == loss.get_config()
    loss = kx.distillation.LogitsDistillation(2.0, "reverse_kl", beta=0.2, reduction="sum")
    config = keras.saving.serialize_keras_object(loss)
    assert keras.saving.deserialize_keras_object(config).get_config() == loss.get_config()


def model(width, seed, head=kx.layers.LogitsDense, dtype=None):
    keras.utils.set_random_seed(seed)
    tokens = keras.Input((None,), dtype="int32")
    x = keras.layers.Embedding(23, width, mask_zero=True, dtype=dtype)(tokens)
    return keras.Model(tokens, head(23, dtype=dtype)(x))


def test_keras_distiller_trains_a_student_without_logits(monkeypatch):
    calls, kernel = [], module.linear_distillation
    monkeypatch.setattr(module, "linear_distillation", lambda *a, **k: calls.append(1) or kernel(*a, **k))
    teacher, student = model(16, 0), model(8, 1)
    tokens = np.where(MASK, np.random.default_rng(0).integers(1, 23, MASK.shape), 0)
    distiller = keras.distillation.Distiller(
        teacher, student, kx.distillation.LogitsDistillation(2.0), student_loss_weight=0.0
    )
    # One batch, of so few steps that the loss still falls at the end.
    distiller.compile(keras.optimizers.Adam(0.01), loss=kx.losses.MaskedSequenceCrossentropy())
    history = distiller.fit(tokens, tokens, epochs=20, verbose=0, batch_size=len(tokens)).history
    assert calls
    x = to_numpy(teacher(tokens))[MASK], to_numpy(student(tokens))[MASK]
    p, q = (softmax(one / 2) for one in x)
    divergence = 4 * (p * np.log(p / q)).sum(-1).mean()
    losses = history["distillation_loss"]
    # The last epoch's loss is that before its step.
    assert divergence < losses[-1] < 0.5 * losses[0]
    first = model(8, 1)
    q = softmax(to_numpy(first(tokens))[MASK] / 2)
    assert losses[0] == pytest.approx(4 * (p * np.log(p / q)).sum(-1).mean(), rel=4e-6)


@whole
@pytest.mark.parametrize("student_head", [kx.layers.LogitsDense, keras.layers.Dense])
@pytest.mark.parametrize("teacher_head", [kx.layers.LogitsDense, keras.layers.Dense])
@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
def test_keras_distiller_of_all_heads_has_the_divergence_of_the_valid_tokens(dtype, teacher_head, student_head):
    teacher, student = model(16, 0, teacher_head, dtype), model(8, 1, student_head, dtype)
    for one in (teacher, student):
        one.set_weights([20 * w for w in one.get_weights()])
    tokens = np.where(MASK, RNG.integers(1, 23, MASK.shape), 0)
    p, q = (softmax(to_numpy(one(tokens))[MASK] / 2) for one in (teacher, student))
    loss = kx.distillation.LogitsDistillation(2.0)
    distiller = keras.distillation.Distiller(teacher, student, loss, student_loss_weight=0.0)
    distiller.compile("sgd", loss=kx.losses.MaskedSequenceCrossentropy())
    found = distiller.evaluate(tokens, tokens, verbose=0, return_dict=True)["distillation_loss"]
    # Logits in bfloat16 have 8 bits, those of the heads are not rounded.
    expected = 4 * (p * np.log(p / q)).sum(-1).mean()
    assert found == pytest.approx(expected, rel=4e-6 if dtype == "float32" else 2e-3)


def compiled_step(loss, teacher, student, tokens):
    """The program of loss and gradient, as text."""
    variables = [v.value for v in student.trainable_variables]
    if BACKEND == "jax":
        import jax

        def value(variables, x):
            logits, _ = student.stateless_call(variables, [], x, training=True)
            return loss.compute_loss(teacher(x, training=False), logits)

        return jax.jit(jax.value_and_grad(value)).lower(variables, tokens).compile().as_text()
    import tensorflow as tf

    @tf.function(jit_compile=True)
    def step(x):
        with tf.GradientTape() as tape:
            value = loss.compute_loss(teacher(x, training=False), student(x, training=True))
        return value, tape.gradient(value, variables)

    return step.experimental_get_compiler_ir(tf.constant(tokens))(stage="optimized_hlo")


def test_the_compiled_step_has_no_logits():
    tokens = np.tile(np.arange(23), (200, 11))[:, :250].astype("int32")
    text = compiled_step(kx.distillation.LogitsDistillation(2.0), model(16, 0), model(8, 1), tokens)
    assert "f32[23,8]" in text or "f32[8,23]" in text  # the student's kernel
    assert "[50000,23]" not in text and "[200,250,23]" not in text


def test_lists_are_taken_as_arrays():
    loss = kx.losses.Distillation()
    assert float(loss(TEACHER.tolist(), STUDENT.tolist())) == pytest.approx(float(loss(TEACHER, STUDENT)), rel=1e-6)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="`y_true` must hold the teacher's logits"):
        kx.losses.Distillation()(TEACHER[..., 1:], STUDENT)
    outputs = {"next": TEACHER}, {"other": STUDENT}
    with pytest.raises(
        ValueError, match=r"same structure.* shapes \{'next': '\(3, 4, 7\)'\} and \{'other': '\(3, 4, 7\)"
    ):
        kx.distillation.LogitsDistillation().compute_loss(*outputs)
    with pytest.raises(ValueError, match="`reduction` must give a scalar"):
        kx.distillation.LogitsDistillation(reduction="none")


def test_a_softmax_at_the_end_is_undone_where_it_is_known_and_said_once():
    models = [keras.Sequential([keras.Input((3,)), keras.layers.Dense(5, "softmax")]) for _ in range(2)]
    x = RNG.standard_normal((6, 3)).astype("float32")
    p, q = (softmax(x @ to_numpy(one.layers[0].kernel) / 2) for one in models)
    loss = kx.losses.Distillation(2.0)
    with pytest.warns(
        UserWarning, match="Distillation compares logits, .* ends in a softmax.* uses the logits"
    ) as seen:
        values = [float(loss(*(one(x) for one in models))) for _ in range(2)]
    assert len(seen) == 1
    np.testing.assert_allclose(values, 4 * (p * np.log(p / q)).sum(-1).mean(), rtol=2e-6)
    with pytest.warns(UserWarning, match="the teacher ends in layer .* with a softmax"):
        keras.distillation.Distiller(*models, kx.distillation.LogitsDistillation())


class Halved(kx.losses.Distillation):
    def call(self, y_true, y_pred):
        return 0.5 * super().call(y_true, y_pred)


class Squared(kx.losses.Distillation):
    def call(self, y_true, y_pred):
        return keras.ops.mean(keras.ops.square(y_true - y_pred), axis=-1)


@fast_for("graph", "jit")
@pytest.mark.parametrize("mode", MODES)
def test_a_subclass_gets_what_its_call_returns(mode):
    weights = np.array([1.0, 2.0, 0.0], "float32")
    student = np.where(MASK[..., None], STUDENT, np.nan).astype("float32")

    def of(loss):
        def run(x):
            internals.set_keras_mask(x, tensor(MASK))
            return loss(TEACHER, x, weights)

        return value_and_gradient(run, tensor(student), mode=mode)

    for got, plain in zip(
        of(Halved(reduction="token_mean")), of(kx.losses.Distillation(reduction="token_mean")), strict=True
    ):
        np.testing.assert_allclose(got, 0.5 * plain, rtol=1e-6)
    value, gradient = of(Squared(reduction="sum"))
    apart = np.where(MASK[..., None], TEACHER.astype("float64") - STUDENT, 0) * weights[:, None, None]
    np.testing.assert_allclose(value, (apart * (TEACHER - STUDENT)).sum() / 7, rtol=2e-6)
    np.testing.assert_allclose(gradient, -2 * apart / 7, rtol=2e-6, atol=1e-7)


def test_a_subclass_on_a_head_is_told_once_that_its_logits_are_made():
    tokens = np.where(MASK, RNG.integers(1, 23, MASK.shape), 0)
    student, teacher = model(8, 1), RNG.standard_normal((*MASK.shape, 23)).astype("float32")
    student.compile("sgd", Squared())
    with pytest.warns(UserWarning, match="Squared overrides `call`") as caught:
        student.fit(tokens, teacher, epochs=2, verbose=0)
    assert len([one for one in caught if "overrides" in str(one.message)]) == 1


@whole
def test_micro_batches_of_an_overridden_call_are_divided_by_the_count_of_the_batch():
    weights = np.array([1.0, 2.0, 0.0], "float32")
    values = []
    for loss in (Halved(reduction="token_mean"), kx.losses.Distillation(reduction="token_mean")):
        with _accumulation.counting() as denominators:
            loss(TEACHER, STUDENT, weights)
        parts = []
        for part, share in ((slice(0, 1), 1 / 3), (slice(1, 3), 2 / 3)):
            with _accumulation.micro_batch(denominators, share):
                parts.append(share * float(loss(TEACHER[part], STUDENT[part], weights[part])))
        assert sum(parts) == pytest.approx(float(loss(TEACHER, STUDENT, weights)), rel=1e-6)
        values.append(sum(parts))
    assert values[0] == pytest.approx(values[1] / 2, rel=1e-6)
