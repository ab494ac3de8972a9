"""Mean cross-entropy per token."""

from typing import Any

import keras
from keras import ops

from keras_xent.kernels._compile import as_written
from keras_xent.metrics.token_mean import LogLikelihoodMean


@keras.saving.register_keras_serializable(package="keras_xent")
class TokenCrossentropy(LogLikelihoodMean):
    """The mean cross-entropy per token in nats, over all tokens since the last reset: the logarithm of `Perplexity`.

    With `name="loss"` it takes the place of what Keras calls `loss` and `val_loss`, the mean of the batches' losses,
    each weighted by its rows: the number of an epoch is then the token mean that `MaskedSequenceCrossentropy` trains
    on. Label smoothing, class weights and z-loss of the loss are left out.

    Formula: `sum_n t_n nll_n / sum_n t_n` over valid tokens `n` with sample weights `t_n`. Nothing counted: nan.

    Equivalent to `keras.losses.SparseCategoricalCrossentropy(from_logits=True)(y_true, y_pred)` over one batch that
    holds every token and no padding.

    Args:
        from_logits, ignore_class, axis, dtype, logit_softcap: as in `Perplexity`.
        name: name of the metric.

    Raises:
        ValueError: shapes that do not fit; in eager mode, a label that is no class.

    Example:

    >>> import numpy as np
    >>> import keras_xent as kx
    >>> metric = kx.metrics.TokenCrossentropy(ignore_class=-1)
    >>> logits = np.log([[[0.25, 0.75], [0.5, 0.5]]])
    >>> metric.update_state(np.array([[0, -1]]), logits)
    >>> round(float(metric.result()), 4)  # -ln 0.25
    1.3863

    References: `Perplexity`.
    """

    def __init__(
        self,
        from_logits: bool = True,
        ignore_class: int | None = None,
        axis: int = -1,
        name: str = "token_crossentropy",
        dtype: Any = None,
        *,
        logit_softcap: float | None = None,
    ) -> None:
        super().__init__(from_logits, ignore_class, axis, name, dtype, logit_softcap)

    @as_written
    def result(self) -> Any:
        """The mean in nats; nan if nothing was counted."""
        return ops.cast(self._mean(), self.dtype)
