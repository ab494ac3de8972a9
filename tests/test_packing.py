"""Weights by which packed documents count the same."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_xent as kx
from tests.backend import to_numpy
from tests.tiers import whole

# Three documents in the first row, two in the second; 0 is padding.
IDS = np.array([[7, 7, 7, 2, 2, 9, 0, 0], [7, 7, 7, 7, 3, 3, 3, 3]])
COUNTED = np.array([[1, 1, 0, 1, 1, 1, 1, 1], [1, 0, 1, 1, 0, 0, 0, 0]], bool)
WEIGHTS = [[1 / 2, 1 / 2, 0, 1 / 2, 1 / 2, 1, 0, 0], [1 / 3, 0, 1 / 3, 1 / 3, 0, 0, 0, 0]]


def test_arrays_of_numpy_and_of_the_backend():
    np.testing.assert_allclose(kx.segment_weights(IDS, COUNTED), WEIGHTS, rtol=1e-7)
    np.testing.assert_allclose(kx.segment_weights(IDS[0], list(COUNTED[0])), WEIGHTS[0], rtol=1e-7)
    found = kx.segment_weights(ops.convert_to_tensor(IDS), ops.convert_to_tensor(COUNTED))
    assert keras.backend.standardize_dtype(found.dtype) == "float32"
    np.testing.assert_allclose(to_numpy(found), WEIGHTS, rtol=1e-7)


def test_padding_may_have_another_number_or_none():
    np.testing.assert_allclose(kx.segment_weights(np.array([0, 0, 5]), padding=5), [0.5, 0.5, 0])
    np.testing.assert_allclose(kx.segment_weights(np.array([0, 0, 5]), padding=None), [0.5, 0.5, 1])


def test_in_tf_data_on_every_backend():
    tf = pytest.importorskip("tensorflow")
    rows = tf.data.Dataset.from_tensor_slices((IDS, COUNTED))
    for data, right in ((rows.map(kx.segment_weights), WEIGHTS), (rows.batch(2).map(kx.segment_weights), [WEIGHTS])):
        np.testing.assert_allclose(list(data.as_numpy_iterator()), right, rtol=1e-7)


def test_in_tf_data_nothing_need_be_known_of_the_shape():
    tf = pytest.importorskip("tensorflow")
    read = tf.data.Dataset.range(1).map(lambda i: tf.numpy_function(lambda _: (IDS, COUNTED), [i], (tf.int64, tf.bool)))
    np.testing.assert_allclose(next(iter(read.map(kx.segment_weights))), WEIGHTS, rtol=1e-7)


def test_negative_padding_that_was_not_named_warns():
    ids = np.array([[0, 0, 1, -1]])
    with pytest.warns(UserWarning, match="the documents of number 0 are left out"):
        kx.segment_weights(ids)
    np.testing.assert_allclose(kx.segment_weights(ids, padding=-1), [[0.5, 0.5, 1, 0]])


@pytest.mark.parametrize("head", [keras.layers.Dense, pytest.param(kx.layers.LogitsDense, marks=whole)])
def test_packed_documents_train_as_one_a_row(head):
    rng = np.random.default_rng(0)
    labels, features = rng.integers(1, 11, IDS.shape), rng.standard_normal((*IDS.shape, 4)).astype("float32")
    labels = np.where(COUNTED & (IDS > 0), labels, 0)
    parts = [(0, slice(0, 3)), (0, slice(3, 5)), (0, slice(5, 6)), (1, slice(0, 4)), (1, slice(4, 8))]
    alone = np.zeros((5, 4), int), np.zeros((5, 4, 4), "float32")
    for row, part in enumerate(parts):
        for array, packed in zip(alone, (labels, features), strict=True):
            array[row, : len(packed[part])] = packed[part]

    def trained(loss, x, y, **weights):
        keras.utils.set_random_seed(1)
        model = keras.Sequential([keras.Input((None, 4)), head(11)])
        model.compile(keras.optimizers.SGD(1.0), loss)
        logged = model.fit(x, y, batch_size=len(y), epochs=2, verbose=0, **weights).history["loss"]
        return [logged, *model.get_weights()]

    per_row = kx.losses.MaskedSequenceCrossentropy(ignore_class=0, reduction="sequence_mean")
    per_token = kx.losses.MaskedSequenceCrossentropy(ignore_class=0)
    expected = trained(per_row, alone[1], alone[0])
    packed = trained(per_token, features, labels, sample_weight=kx.segment_weights(IDS, labels != 0))
    for one, other in zip(packed, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)


def test_a_mask_of_another_shape_is_an_error():
    with pytest.raises(ValueError, match="`mask` must have the shape of `segment_ids`"):
        kx.segment_weights(IDS, COUNTED[0])
