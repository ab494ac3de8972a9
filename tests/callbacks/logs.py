"""Reading what TensorBoard's files hold."""

import tensorflow as tf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def events(folder):
    return EventAccumulator(str(folder), size_guidance={"tensors": 0}).Reload()


def of_plugin(folder, plugin):
    """For each tag of the plugin the arrays that were written, by step."""
    read = events(folder)
    return {
        tag: {event.step: tf.make_ndarray(event.tensor_proto) for event in read.Tensors(tag)}
        for tag in read.Tags()["tensors"]
        if read.SummaryMetadata(tag).plugin_data.plugin_name == plugin
    }


def scalars(folder):
    """For each scalar its values by step."""
    found = of_plugin(folder, "scalars")
    return {tag: {step: array.item() for step, array in values.items()} for tag, values in found.items()}
