"""Limits of what a row may hold, checked before memory or time is spent on it."""

import re
import reprlib
from collections.abc import Iterable
from typing import Any

from antgmm_jax.errors import AntgmmError

MOST_PIXELS = 50_000_000
"""Pixels of a picture. Decoding takes up to 18 bytes for each (turned TIFF of four channels, Pillow 13)."""
LONGEST_SIDE = 1 << 15
"""Pixels of a side of a picture."""
SAMPLE_BYTES = 1 << 28
"""Bytes of all files of a sample in an archive, or of all values of a row of a table."""
GROUP_BYTES = 1 << 28
"""Bytes of a row group of Parquet in memory, whatever it takes in its file."""
EXPANSION = 16
"""Larger row groups take at most this many times the size of their file: pictures 1, texts 2 to 5."""
MOST_CHARACTERS = 1 << 22
"""Characters of a text."""
MOST_TOKENS, LONGEST_ANSWER = 1 << 20, 1 << 16
"""Tokens of a row or request and of an answer: arrays of this length are allocated."""
LINE_CHARACTERS = 200
"""Characters of a value in an error, so that its line can be read."""
_SURROGATES = re.compile("[\ud800-\udfff]")


class BadRow(Exception):
    """An invalid row; the message is a short reason."""


def short(text: str) -> str:
    """Returns a text for an error, without its middle if it is long."""
    half = LINE_CHARACTERS // 2
    return text if len(text) <= LINE_CHARACTERS else f"{text[:half]}...{text[-half:]}"


def quoted(value: Any) -> str:
    """Returns any value of a row as Python writes it, for an error; without its middle if it is long or deep."""
    return short(repr(short(value)) if isinstance(value, str) else reprlib.repr(value))


def check_picture(name: str, size: tuple[int, int]) -> None:
    """Raises BadRow if a picture has too many pixels, given the width and height of its header."""
    width, height = size
    if max(size) > LONGEST_SIDE or width * height > MOST_PIXELS:
        limits = f"sides of {LONGEST_SIDE} and {MOST_PIXELS} pixels"
        raise BadRow(f"image {name} has {width} x {height} pixels, at most {limits} are supported: make it smaller")


def check_sample(sizes: Iterable[int]) -> None:
    """Raises BadRow if the files or values of a row have too many bytes, given the size of each."""
    if (total := sum(sizes)) > SAMPLE_BYTES:
        raise BadRow(f"has {total} bytes, at most {SAMPLE_BYTES >> 20} MiB are supported: make it smaller")


def check_group(name: str, size: int, stored: int) -> None:
    """Checks that a file of a few bytes does not become gigabytes.

    Args:
        name: describes a row group, or a column of it, for messages.
        size: its bytes in memory.
        stored: bytes of its file.

    Raises:
        AntgmmError: it takes too much memory.
    """
    if size > max(GROUP_BYTES, EXPANSION * stored):
        sizes = f"{size >> 20} MiB in a file of {stored} bytes"
        raise AntgmmError(f"{name} holds {sizes}: shorten its values or write smaller row groups")


def check_text(name: str, text: str) -> None:
    """Raises BadRow if a text is too long, or no UTF-8 file can hold it."""
    if len(text) > MOST_CHARACTERS:
        raise BadRow(f"{name} has {len(text)} characters, at most {MOST_CHARACTERS} are supported: shorten it")
    if half := _SURROGATES.search(text):
        raise BadRow(f"{name} holds {half[0]!r}, half of a character: write the whole character")
