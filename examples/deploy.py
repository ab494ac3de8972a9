"""From a trained language model to the loss as a service: export it, and score text where there is no Keras.

    python examples/deploy.py            # with the model of examples/language_model.py, trained first if it is missing
    python examples/deploy.py --smoke    # the same steps at toy size, in seconds

The SavedModel is loaded by a fresh process that cannot import Keras or `keras_xent`, and converted for LiteRT, the
runtime of phones. Both must give the perplexity that Keras evaluates here.
"""

import argparse
import subprocess
import sys
import time
import warnings
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from language_model import PAD, START

import keras_xent

# What a server does. It has TensorFlow, the folder of the SavedModel, and nothing else.
SERVER = """
import sys

sys.modules["keras"] = sys.modules["keras_xent"] = None  # an import of either is an error from here on
import numpy as np
import tensorflow as tf

folder, given, results = sys.argv[1:]
tokens = np.load(given)
scored = tf.saved_model.load(folder).signatures["score"](
    token_ids=tf.constant(tokens), mask=tf.ones(tokens.shape, tf.bool)
)
np.savez(results, **{name: value.numpy() for name, value in scored.items()})
"""


def in_fresh_process(scorer, tokens, output):
    """Returns the outputs of the signature `score` in another process."""
    given, results = output / "tokens.npy", output / "scores.npz"
    np.save(given, tokens)
    subprocess.run([sys.executable, "-c", SERVER, scorer, given, results], check=True)
    with np.load(results) as arrays:
        return dict(arrays)


def in_litert(scorer, tokens, output):
    """Returns the outputs of the signature after its conversion to a file for LiteRT."""
    loaded = tf.saved_model.load(str(scorer))
    # The causal mask of Keras' attention converts only where the length is known.
    fixed = tf.Module()
    fixed.scorer = loaded
    fixed.score = tf.function(
        lambda token_ids, mask: loaded.score(token_ids, mask),
        input_signature=[tf.TensorSpec(tokens.shape, tf.int32), tf.TensorSpec(tokens.shape, tf.bool)],
    )
    without_gradients = tf.saved_model.SaveOptions(experimental_custom_gradients=False)
    tf.saved_model.save(fixed, str(output / "fixed"), {"score": fixed.score}, without_gradients)
    converter = tf.lite.TFLiteConverter.from_saved_model(str(output / "fixed"), signature_keys=["score"])
    (output / "scorer.tflite").write_bytes(converter.convert())
    with warnings.catch_warnings():
        # The interpreter is moving into a package of its own, and says so.
        warnings.filterwarnings(
            "ignore", message=r"\s*Warning: tf.lite.Interpreter is deprecated", category=UserWarning
        )
        interpreter = tf.lite.Interpreter(model_path=str(output / "scorer.tflite"))
    return interpreter.get_signature_runner("score")(token_ids=tokens, mask=np.ones(tokens.shape, bool))


def main(output, smoke):
    """Export, score in three places, and compare."""
    begin = time.perf_counter()
    if not (output / "model.keras").exists():
        print("Training the language model ...")
        script = Path(__file__).with_name("language_model.py")
        subprocess.run([sys.executable, script, "--output", output, *["--smoke"] * smoke], check=True)

    model = keras.models.load_model(output / "model.keras")
    keras_xent.fuse_head(model)  # scores without the logits in memory
    inputs, targets = np.load(output / "validation.npy")
    perplexity = model.evaluate(inputs, targets, verbose=0, return_dict=True)["perplexity"]

    scorer = output / "scorer"
    keras_xent.deploy.export_scorer(
        model, scorer, tokenizer=output / "tokenizer.json", start_token=START, context=inputs.shape[1]
    )
    # Each row as one text, which begins with the start token.
    tokens = np.insert(targets, 0, START, axis=1).astype("int32")
    results = {
        "the fresh process": in_fresh_process(scorer, tokens, output),
        "LiteRT": in_litert(scorer, tokens, output),
    }
    print(f"Perplexity of {np.count_nonzero(targets != PAD):,} tokens of validation text")
    print(f"  evaluated by Keras       {perplexity:12.6f}")
    for place, scores in results.items():
        scored = np.exp(-scores["log_likelihood"].sum(dtype="float64") / scores["num_tokens"].sum())
        print(f"  scored in {place:17}  {scored:10.6f}")
        np.testing.assert_allclose(scored, perplexity, rtol=1e-5)
    print(f"\nFinished in {time.perf_counter() - begin:.0f} s. To score text files, and see their tokens:")
    print(f"  {sys.executable} -m keras_xent.deploy score {scorer} FILE... --html page.html")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="every step at toy size, in seconds")
    parser.add_argument("--output", type=Path, default=Path("demo-output"), metavar="DIR", help="default: %(default)s")
    arguments = parser.parse_args()
    main(arguments.output, arguments.smoke)
