"""The books of runs and caches: JSON objects with a checksum of their contents, which is verified.

JSON has neither NaN nor infinity, and other readers refuse a file with them; a book has null in their place.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from antgmm_jax.errors import AntgmmError
from antgmm_jax.io.files import OWN, read_json
from antgmm_jax.io.folders import new_file

_CHECKSUM = "checksum"


def as_json(value: Any, default: Any = float) -> Any:
    """Returns a value with the types of JSON; NaN and infinity become None.

    Args:
        value: values of JSON.
        default: converts other values.
    """
    return json.loads(json.dumps(value, default=default), parse_constant=lambda name: None)


def sealed(record: Mapping[str, Any], default: Any = float) -> str:
    """Returns a record as JSON text with its checksum.

    Args:
        record: values of JSON.
        default: converts other values.
    """
    plain = as_json(record, default)
    return json.dumps({**plain, _CHECKSUM: _digest(plain)}, indent=1, allow_nan=False) + "\n"


def write_book(path: Path, record: Mapping[str, Any]) -> None:
    """Writes a record with its checksum atomically. Raises AntgmmError if the file cannot be written."""
    with new_file(path) as partial:
        partial.write_text(sealed(record), encoding="utf-8")


def read_book(path: Path, remedy: str = "remove it and run it again") -> dict[str, Any]:
    """Reads a record and verifies its checksum.

    Args:
        path: file of `write_book`.
        remedy: what the user can do if it is damaged.

    Returns:
        The record without its checksum; None for numbers that are not finite.

    Raises:
        AntgmmError: the file is missing, is not such a record, or was altered.
    """
    record = read_json(path, remedy, OWN)
    if record.pop(_CHECKSUM, None) != _digest(record):
        raise AntgmmError(f"{path} is damaged or of an earlier version, its checksum does not fit: {remedy}")
    return record


def _digest(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16]
