"""Which backend the tests run on, decided before anything imports Keras: the environment's, else TensorFlow."""

import os

# Else a keras.json in the home directory would decide.
os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
