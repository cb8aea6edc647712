"""Bounds of the numbers in a checkpoint's config files, checked before anything is built of them."""

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from antgmm_jax.errors import AntgmmError

# Libraries build lists with an entry per layer or label, and text with a word per image token.
_MODEL = ((re.compile(r"layers|depth|blocks|labels"), 10_000), (re.compile(r""), 1 << 31))
_PROCESSOR = (
    (re.compile(r"seq_len|tokens|patches|frames|patch|merge"), 1 << 16),
    (re.compile(r"width|height|edge|^(image_|crop_)?size$"), 1 << 14),
    (re.compile(r""), 1 << 25),
)
_PIXELS, _COUNTS_PIXELS = re.compile(r"edge"), "merge_size"
_MOST_PIXELS = 1 << 25
_VIDEO = 1 << 31
"""Videos are not read: nothing is built of their settings."""
_FREE = ("model_max_length",)
"""transformers writes 1e30 for none."""


def check_model_config(path: Path, content: Mapping[str, Any]) -> None:
    """Raises AntgmmError if a number in config.json is larger than that of any model."""
    _check(path, content, _MODEL)


def check_processor_config(path: Path, content: Mapping[str, Any]) -> None:
    """Raises AntgmmError if a number in the config of a processor or tokenizer is larger than that of any other."""
    _check(path, content, _PROCESSOR)


def _check(path: Path, content: Mapping[str, Any], limits: tuple[tuple[re.Pattern[str], int], ...]) -> None:
    for name, value, pixels in _numbers(content, "", False):
        key = name.rpartition(".")[2]
        if key in _FREE:
            continue
        limit = next(limit for pattern, limit in limits if pattern.search(key))
        if "video" in f"{path.name} {name}":
            limit = _VIDEO
        limit = _MOST_PIXELS if pixels and _PIXELS.search(key) and limit < _MOST_PIXELS else limit
        if not math.isfinite(value) or abs(value) > limit:
            raise AntgmmError(f"{path}: {name} = {str(value)[:20]}, at most {limit} is supported: correct it")


def _numbers(value: Any, name: str, pixels: bool) -> Iterator[tuple[str, float, bool]]:
    """Names of all numbers at any depth, and whether edges beside them count the pixels of a picture."""
    if isinstance(value, Mapping):
        pixels = pixels or _COUNTS_PIXELS in value
        for key, inner in value.items():
            yield from _numbers(inner, f"{name}.{key}" if name else str(key), pixels)
    elif isinstance(value, list):
        for inner in value:
            yield from _numbers(inner, name, pixels)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield name, value, pixels
