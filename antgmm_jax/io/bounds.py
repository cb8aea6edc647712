"""Bounds of the numbers in a checkpoint's config files, checked before anything is built of them."""

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from re import _parser  # pyright: ignore[reportAttributeAccessIssue]
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


_KEYS = "|".join("".join(rf"(?:{letter}|\\u00{ord(letter):x})" for letter in key) for key in ("normalizer", "decoder"))
_REPLACING = re.compile(rf'"(?:{_KEYS})"\s*:\s*(?=\{{)'.encode(), re.IGNORECASE)
"""The keys of what replaces text, with or without escapes; the vocabulary is not parsed for them."""
_CLASS = re.compile(r"\\[pP]\{[^}]*\}")
"""Classes of characters that Python's expressions lack."""
_LONGEST = 4 << 20
"""Bytes of a normalizer or decoder; the largest are tables of characters, of some 100 kB."""
_GROWTH = 64
"""Times by which a tokenizer may lengthen a text before it splits it; released ones do so at most twice."""


def check_model_config(path: Path, content: Mapping[str, Any]) -> None:
    """Raises AntgmmError if a number in config.json is larger than that of any model."""
    _check(path, content, _MODEL)


def check_processor_config(path: Path, content: Mapping[str, Any]) -> None:
    """Raises AntgmmError if a number in the config of a processor or tokenizer is larger than that of any other."""
    _check(path, content, _PROCESSOR)


def check_replacements(path: Path) -> None:
    """Checks that a tokenizer does not lengthen a text without a bound, as by doubling a letter forty times.

    Args:
        path: tokenizer.json.

    Raises:
        AntgmmError: it does, or its normalizer or decoder is not JSON.
    """
    content, place = path.read_bytes(), 0
    while match := _REPLACING.search(content, place):
        try:
            text = content[match.end() : match.end() + _LONGEST].decode(errors="replace")
            parts, length = json.JSONDecoder().raw_decode(text)
            growth = _growth(parts)
        except (ValueError, RecursionError) as error:
            raise AntgmmError(f"{path} is not JSON ({str(error)[:80]}): copy it again") from error
        if growth > _GROWTH:
            raise AntgmmError(f"{path}: its normalizer or decoder makes a text {growth:.2g} times longer: correct it")
        place = match.end() + len(text[:length].encode())


def _growth(part: Any) -> float:
    """Upper bound of the times by which a part lengthens a text, without what it adds at the ends."""
    if not isinstance(part, dict):
        return 1.0
    if isinstance(parts := part.get("normalizers", part.get("decoders")), list):
        return math.prod(map(_growth, parts))
    content, pattern = part.get("content"), part.get("pattern")
    if not isinstance(content, str) or not isinstance(pattern, dict):
        return 1.0
    replaced = pattern.get("String")
    shortest = len(replaced) if isinstance(replaced, str) else _shortest(pattern.get("Regex"))
    # What matches nothing also matches between all letters.
    return max(1.0, len(content) / shortest) if shortest else 1.0 + len(content)


def _shortest(expression: Any) -> int:
    """Number of letters of the shortest match of a regular expression; 0 if it is not known."""
    try:
        # No public function computes the width of an expression.
        return _parser.parse(_CLASS.sub(".", expression)).getwidth()[0]
    except (re.error, TypeError, RecursionError, OverflowError):  # also expressions that only Oniguruma knows
        return 0


def _check(path: Path, content: Mapping[str, Any], limits: tuple[tuple[re.Pattern[str], int], ...]) -> None:
    for name, value, pixels in _numbers(content, "", False):
        key = name.rpartition(".")[2]
        if key in _FREE:
            continue
        limit = next(limit for pattern, limit in limits if pattern.search(key))
        if "video" in f"{path.name} {name}":
            limit = _VIDEO
        limit = _MOST_PIXELS if pixels and _PIXELS.search(key) and limit < _MOST_PIXELS else limit
        if key == "rope_theta" and value <= 0:
            raise AntgmmError(f"{path}: {name} = {str(value)[:20]}, it must be positive: correct it")
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
