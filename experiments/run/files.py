"""Files that appear whole or not at all."""

import json
import math
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


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file atomically."""
    write_text(path, json_text(value) + "\n")


def json_text(value: Any) -> str:
    """Formats JSON types and other numbers as JSON; NaN and infinity, which JSON does not have, are null."""
    return json.dumps(_finite(value), indent=1, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    if value is None or isinstance(value, str | bool | int):
        return value
    return float(value) if math.isfinite(value) else None
