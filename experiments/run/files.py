"""Files that appear whole or not at all."""

import json
from pathlib import Path
from typing import Any

from antgmm_jax.io.books import as_json
from antgmm_jax.io.folders import new_file

MARK = "# plan of "
"""Begins the file of a plan, see `experiments.auto.goal`; the goal follows in the same line."""


def nearest(folder: Path) -> Path:
    """Returns the folder, or the nearest one above it that exists."""
    return next(one for one in (folder, *folder.absolute().parents) if one.exists())


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file atomically."""
    with new_file(path) as partial:
        partial.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 file atomically."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file atomically."""
    write_text(path, json_text(value) + "\n")


def json_text(value: Any) -> str:
    """Formats JSON types and other numbers as JSON; NaN and infinity, which JSON does not have, are null."""
    return json.dumps(as_json(value), indent=1, allow_nan=False)
