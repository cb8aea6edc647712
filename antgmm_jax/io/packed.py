"""Arrays inside of JSON records: small ones as lists that a person can read, large ones as their bytes in base64.

The basis of a width of 4 096 channels would take 220 MB as lists of numbers, and takes 45 MB.
"""

import base64
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

LISTED = 1_000
"""Most elements of an array that is written as lists."""
_FIELDS = {"dtype", "shape", "base64"}
_DTYPES = ("bool", "int32", "int64", "float32", "float64")


def packed(array: np.ndarray) -> Any:
    """Returns an array as values of JSON, from which `unpacked` restores a large one."""
    if array.size <= LISTED or array.dtype.name not in _DTYPES:
        return array.tolist()
    little = array.astype(array.dtype.newbyteorder("<"), order="C")
    text = base64.b64encode(little.tobytes()).decode()
    return {"dtype": array.dtype.name, "shape": list(array.shape), "base64": text}


def unpacked(value: Any) -> Any:
    """Restores the large arrays among the values of JSON objects; small ones stay lists.

    Args:
        value: values of JSON.

    Raises:
        ValueError: an object with the fields of an array holds none.
    """
    if not isinstance(value, Mapping):
        return value
    if value.keys() != _FIELDS:
        return {name: unpacked(inner) for name, inner in value.items()}
    dtype, shape, text = value["dtype"], value["shape"], value["base64"]
    if dtype not in _DTYPES or not isinstance(text, str):
        raise ValueError(f"an array of {dtype}")
    if not isinstance(shape, list) or not all(isinstance(size, int) and size >= 0 for size in shape):
        raise ValueError(f"an array of shape {shape}")
    try:
        content = base64.b64decode(text, validate=True)
    except ValueError as error:
        raise ValueError(f"an array whose bytes are no base64 ({error})") from error
    whole = np.dtype(dtype).newbyteorder("<")
    if len(content) != math.prod(shape) * whole.itemsize:
        raise ValueError(f"{len(content)} bytes for an array of shape {shape}")
    return np.frombuffer(content, whole).astype(dtype).reshape(shape)
