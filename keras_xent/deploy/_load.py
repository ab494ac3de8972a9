"""Loading of exported scorers."""

import importlib.util
from pathlib import Path
from typing import Any

from keras_xent.deploy._scorer import Scorer


def load_scorer(path: Any) -> Scorer:
    """Loads a scorer that `export_scorer` has written.

    A SavedModel is a program, which TensorFlow's runtime executes: load one only from a source whose programs you would
    run. Nothing is unpickled, and the files beside it are read as JSON.

    Args:
        path: the folder that was given to `export_scorer`.

    Returns:
        A `Scorer`.

    Raises:
        ImportError: TensorFlow is not installed.
        ValueError: no SavedModel, one that TensorFlow cannot load, or one without our signature.

    Example:

    >>> import keras_xent as kx
    >>> kx.deploy.load_scorer("model.keras")
    Traceback (most recent call last):
    ValueError: `path` must be a folder that `export_scorer` has written. Received: 'model.keras', ...
    """
    folder = Path(path)
    if not (folder / "saved_model.pb").is_file():
        what = "which is no folder with a saved_model.pb"
        if folder.suffix in (".keras", ".h5"):
            what = "a file of Keras: load it with `keras.models.load_model`, and export the model"
        raise ValueError(f"`path` must be a folder that `export_scorer` has written. Received: '{path}', {what}.")
    if importlib.util.find_spec("tensorflow") is None:
        raise ImportError("`load_scorer` needs tensorflow, which runs SavedModels. Run: pip install tensorflow")
    # On JAX, nothing else imports TensorFlow.
    import tensorflow as tf

    try:
        loaded = tf.saved_model.load(str(folder))
    # What the loader raises is not documented.
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"TensorFlow cannot load the SavedModel '{path}' ({reason.rstrip('.')}). Export the model again."
        ) from error
    signatures = getattr(loaded, "signatures", {})
    if "score" not in signatures:
        names = ", ".join(map(repr, signatures)) or "none"
        raise ValueError(
            f"The SavedModel '{path}' has no signature 'score'. Received: {names}. Write it with "
            "`keras_xent.deploy.export_scorer`, 'score' among its `endpoints`."
        )
    return Scorer(loaded, folder)
