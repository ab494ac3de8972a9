"""The head of predictions, for losses that can do without the logits, and what keeps the logits in memory after all."""

from typing import Any

from keras import ops

from keras_xent import _accumulation, _keras, provenance
from keras_xent._types import Tensor
from keras_xent.kernels._shapes import align_weights


def head_for(loss: Any, y_pred: Tensor) -> provenance.Head | None:
    """The head that a loss computes from instead of reading the predictions; None where there is none."""
    logits = provenance.fusible_logits(y_pred, axis=loss.axis, from_logits=loss.from_logits)
    if logits is None:
        return None
    name, head = type(loss).__name__, provenance.head_of(logits)
    if head is None and (reason := provenance.materialized_because(logits)):
        loss._warn_once("provenance", f"{name} materializes the logits, since {reason}: it reads them as they are.")
        return None
    if head is None and (detached := provenance.detached_head(logits)) is not None:
        loss._warn_once(
            "provenance",
            f"{name} materializes the logits of layer '{detached}': what comes after the "
            "layer returns a new tensor, which carries no provenance. End the model in that layer. The loss reads "
            "16-bit logits as they are, so that a float32 Activation after it is not needed.",
        )
    if head is not None and (readers := _metrics_that_read_logits()):
        loss._warn_once(
            "readers",
            f"The logits of layer '{head.layer}' are materialized, since the metric {readers[0]} reads them; "
            f"{name} alone does not. Nor do keras_xent.metrics.TokenAccuracy and Perplexity.",
        )
    # Two caps, one after the other, are not one cap.
    return None if head is not None and head.logit_softcap and loss.logit_softcap else head


def call_reads_logits(loss: Any, head: provenance.Head) -> str:
    """What a user should know whose subclass of a loss has a `call` of its own."""
    return (
        f"{type(loss).__name__} overrides `call`, which gets the logits of layer '{head.layer}': they are "
        "materialized, and the fused computation of the loss is not used."
    )


def options_of(loss: Any, head: provenance.Head) -> dict[str, Any]:
    """The arguments of a linear kernel that a loss and a head decide."""
    return {
        **head.arguments(),
        # The kernel computes in the dtype of the hidden states.
        "hidden": ops.cast(head.hidden, "float64") if loss.dtype == "float64" else head.hidden,
        "label_smoothing": loss.label_smoothing,
        "class_weight": loss.class_weight,
        "focal_gamma": loss.focal_gamma,
        "z_loss": loss.z_loss,
        "logit_softcap": head.logit_softcap or loss.logit_softcap,
        "reduction": loss.reduction,
        "normalizer": _accumulation.divisor(loss.normalizer),
        "training": head.training,
        "gradients": head.gradients,
    }


def mask_and_weights(y_pred: Tensor, sample_weight: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The Keras mask of the predictions, of the shape of the tokens, and the sample weights; None where not given."""
    mask = align_weights(_keras.mask_of(y_pred), tokens.shape, "mask")
    mask = None if mask is None else ops.broadcast_to(mask, ops.shape(tokens))
    return mask, align_weights(sample_weight, tokens.shape)


def _metrics_that_read_logits() -> list[str]:
    """Names and packages of the metrics that read the logits of the model of this step, by what it was compiled with.

    Of a model with several outputs it is not known which metrics belong to which.
    """
    model = _keras.model_of_step()
    if model is None or len(getattr(model, "outputs", None) or [None]) > 1:
        return []
    # Those that were given to `compile` are inside one of the model's metrics.
    compiled = [metric for one in model.metrics for metric in getattr(one, "metrics", ())]
    readers = [metric for metric in compiled if not getattr(metric, "reuses_loss_statistics", False)]
    return [f"'{metric.name}' of {type(metric).__module__.partition('.')[0]}" for metric in readers]
