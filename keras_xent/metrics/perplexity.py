"""Perplexity of what a language model predicts."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import ops

from keras_xent._backend import no_autograph
from keras_xent._types import DType, Tensor
from keras_xent.metrics._group_sums import Groups
from keras_xent.metrics._token_mean import TokenValues, Totals
from keras_xent.metrics.token_crossentropy import TokenCrossentropy


@keras.saving.register_keras_serializable(package="keras_xent")
class Perplexity(TokenCrossentropy):
    """The exponential of the mean cross-entropy per token, over all tokens since the last reset.

    Every valid token counts the same, however the batches were cut. Give it in `compile(weighted_metrics=[...])` if
    sample weights mark padding, in `metrics=[...]` otherwise; a Keras mask and `ignore_class` count in both. Label
    smoothing and class weights of the loss are left out: perplexity is a property of the model's probabilities.

    Formula: `exp(sum_n t_n nll_n / sum_n t_n)` over valid tokens `n` with sample weights `t_n`. The exponential is
    taken in `result()` only; past 88 nats it is inf in float32, and `nll()` still has the mean. Without a valid token:
    nan.

    Equivalent to `exp(keras.losses.SparseCategoricalCrossentropy(from_logits=True)(y_true, y_pred))` over one batch
    that holds every token and no padding.

    Args:
        from_logits: whether `y_pred` holds logits or probabilities.
        ignore_class: the label of padding.
        axis: the class axis.
        name: name of the metric (default `"perplexity"`).
        dtype: dtype of the result (default float32). The sums are exact to 2^48 tokens whatever it is.
        logit_softcap: the loss's `logit_softcap`, if it has one.
        groups: names of groups of examples or tokens, such as domains or tasks. The logs then also have
            `perplexity/<group>` for each, of the same pass.
        group_of: where the groups' numbers, counted from 0, are found: the name of an entry of `x`, a dict, which the
            model need not use, in `fit`, `evaluate` and a model's own steps; or a function of the labels. One number
            for each example, `[B]`, or token, `[B, T]`. Tokens of any other number are in no group. Of several outputs
            give each such metric a `name`: Keras then leaves out that of the output.

    Raises:
        ValueError: shapes that do not fit; in eager mode, a label out of range; an entry that `x` does not have.

    Warns once where logits are expected and probabilities are received.

    Example:

    >>> import keras
    >>> import numpy as np
    >>> import keras_xent as kx
    >>> metric = kx.metrics.Perplexity(ignore_class=-1)
    >>> logits = np.log([[[0.25, 0.75], [0.5, 0.5]]])
    >>> metric.update_state(np.array([[0, -1]]), logits)
    >>> round(float(metric.result()), 4)
    4.0

    By domain, in a model whose input is called "tokens":

    >>> domains = kx.metrics.Perplexity(groups=["code", "prose"], group_of="domain")
    >>> tokens = keras.Input((None,), name="tokens")
    >>> logits = kx.layers.LogitsDense(50)(keras.layers.Embedding(50, 8)(tokens))
    >>> model = keras.Model(tokens, logits)
    >>> model.compile("adam", kx.losses.MaskedSequenceCrossentropy(), metrics=[domains])
    >>> # model.fit({"tokens": tokens, "domain": domain_of_each_row}, labels)

    References: `exp` of equation (1) of arXiv:2203.15556 and of the cross-entropy in nats everywhere.
    """

    _default_name = "perplexity"

    def __init__(
        self,
        from_logits: bool = True,
        ignore_class: int | None = None,
        axis: int = -1,
        name: str | None = None,
        dtype: DType = None,
        *,
        logit_softcap: float | None = None,
        groups: Sequence[str] | None = None,
        group_of: Callable | str | None = None,
    ) -> None:
        self._groups = Groups(groups, group_of)
        self._num_sums = len(Totals._fields) + 2 * len(self._groups)
        super().__init__(from_logits, ignore_class, axis, name, dtype, logit_softcap=logit_softcap)
        self.groups, self.group_of = self._groups.names, group_of

    def nll(self) -> Tensor:
        """Mean negative log-likelihood per token, in nats; nan without a valid token."""
        return self._mean()

    @no_autograph
    def result(self) -> Any:
        """The perplexity; nan without a valid token. With groups a dict, also of `<name>/<group>`."""
        whole = ops.cast(ops.exp(self.nll()), self.dtype)
        if self.groups is None:
            return whole
        total, weight = ops.split(self._sums.values()[len(Totals._fields) :], 2)
        # Without a token 0 / 0, which is nan.
        values = ops.unstack(ops.cast(ops.exp(total / weight), self.dtype), len(self.groups))
        return {self.name: whole, **{f"{self.name}/{g}": one for g, one in zip(self.groups, values, strict=True)}}

    def _sum(self, tokens: TokenValues) -> Tensor:
        sums = super()._sum(tokens)
        if self.groups is None:
            return sums
        values = ops.where(ops.equal(tokens.weights, 0), 0.0, ops.cast(tokens.values, "float32"))
        return ops.concatenate([sums, self._groups.sums(values, tokens.weights, tokens.labels)])

    def get_config(self) -> dict[str, Any]:
        """Every argument of the constructor."""
        config = super().get_config()
        if callable(config.get("group_of")):
            config["group_of"] = keras.saving.serialize_keras_object(config["group_of"])
        return config

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Perplexity":
        """The metric of a configuration."""
        group_of = config.get("group_of")
        if isinstance(group_of, dict):
            config = {**config, "group_of": keras.saving.deserialize_keras_object(group_of)}
        return cls(**config)
