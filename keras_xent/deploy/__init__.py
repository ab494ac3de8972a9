"""From a trained model to production: SavedModels that score, without this package and without Keras."""

from keras_xent.deploy._export import export_scorer
from keras_xent.deploy._load import load_scorer
from keras_xent.deploy._scorer import Scorer

__all__ = ["Scorer", "export_scorer", "load_scorer"]
