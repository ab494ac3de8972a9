"""What is measured: one line of a table, and the cases that several rows have."""

from typing import NamedTuple


class Work(NamedTuple):
    """One line of a table."""

    row: str
    case: dict
    peers: dict[str, str]
    unit: str = "milliseconds"

    def of_libraries(self, libraries: list[str]) -> "Work":
        """The same, with the peers of these libraries only."""
        return self._replace(peers={name: library for name, library in self.peers.items() if library in libraries})


def of_loss(loss: str, shape, dtype: str, smoothing: float = 0.0) -> dict:
    """The case of a loss over logits."""
    sizes = {"shape": shape.name, "rows": shape.rows, "classes": shape.classes}
    return {"question": "loss", "loss": loss, **sizes, "dtype": dtype, "smoothing": smoothing}


def of_head(head, valid: float = 1.0, **more) -> dict:
    """The case of a head with its loss."""
    sizes = {"shape": head.name, "rows": head.tokens, "features": head.features, "classes": head.classes}
    return {"question": "linear", **sizes, "dtype": "float32", "valid": valid, **more}


MODELS = {
    "transformer": {"batch": 8, "length": 128, "features": 128, "classes": 8192},
    "head_fit": {"batch": 16, "length": 512, "features": 256, "classes": 32_000},
    "metrics": {"batch": 8, "length": 512, "features": 256, "classes": 32_000},
}


def of_model(question: str, model: str, **more) -> dict:
    """The case of a step of a whole model."""
    case = {"question": question, "model": model, **MODELS[model], "dtype": "float32", **more}
    return {"rows": case["batch"] * case["length"], **case}
