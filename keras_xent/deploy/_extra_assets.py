"""Files beside an exported SavedModel: its tokenizer, and the settings that `load_scorer` reads."""

import json
from pathlib import Path
from typing import Any

# The folder of a SavedModel that TensorFlow leaves alone, and our files in it.
EXTRA_ASSETS, METADATA, TOKENIZER = "assets.extra", "scorer.json", "tokenizer.json"


def write(folder: Path, metadata: dict[str, Any], tokenizer: str | None) -> None:
    """Writes both; a tokenizer of an earlier model does not stay."""
    extra = folder / EXTRA_ASSETS
    extra.mkdir(exist_ok=True)
    (extra / METADATA).write_text(json.dumps(metadata, indent=2) + "\n")
    (extra / TOKENIZER).unlink(missing_ok=True)
    if tokenizer is not None:
        (extra / TOKENIZER).write_text(tokenizer, encoding="utf-8")


def read(folder: Path) -> tuple[dict[str, int | None], Path | None]:
    """Returns the settings (empty if the model was exported otherwise), and the path of the tokenizer or None."""
    path, tokenizer = (folder / EXTRA_ASSETS / name for name in (METADATA, TOKENIZER))
    metadata = _checked_metadata(path) if path.is_file() else {}
    return metadata, tokenizer if tokenizer.is_file() else None


def _checked_metadata(path):
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        metadata = {name: content[name] for name in ("num_classes", "ignore_class", "start_token", "context")}
    except (ValueError, TypeError, KeyError):
        metadata = None
    if metadata is None or not all(value is None or type(value) is int for value in metadata.values()):
        raise ValueError(f"'{path}' is not what `export_scorer` writes. Export the model again.")
    return metadata
