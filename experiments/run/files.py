"""Files that appear whole or not at all."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from antgmm_jax.io.folders import new_file


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file atomically."""
    with new_file(path) as partial:
        partial.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 file atomically."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a JSON file atomically."""
    write_text(path, json.dumps(value, indent=1, default=float) + "\n")
