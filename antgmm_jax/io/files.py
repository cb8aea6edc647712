"""JSON files that somebody else may have written or damaged: one line for every fault."""

import json
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from antgmm_jax.errors import AntgmmError

LARGEST_FILE = 256 << 20
"""Bytes of a file of a tokenizer; released ones have up to 40 MB."""


class Bounds(NamedTuple):
    """Most bytes, and most lists and objects, of a JSON file that Python parses; 2 million empty lists take 450 MB.

    Brackets inside of strings count too: strings are not told apart before they are parsed.
    """

    size: int
    parts: int


FOREIGN = Bounds(32 << 20, 100_000)
"""Of files that somebody else wrote."""
OWN = Bounds(1 << 30, 2_000_000)
"""Of files that this library wrote: a record may hold bases of widths, or a model's answers to many rows."""


def check_regular(path: Path) -> None:
    """Checks that a path is a regular file or a link to one: reading a pipe or a device may never end.

    Raises:
        AntgmmError: it is something else, or a link to itself, or its name is too long.
        FileNotFoundError: it does not exist.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        if path.is_symlink():
            raise AntgmmError(f"{path} is a link to a file that does not exist: replace it with the file") from None
        raise
    except (OSError, ValueError) as error:
        raise AntgmmError(f"{str(path)[:200]} cannot be read ({_reason(error)}): replace it with a file") from error
    if not stat.S_ISREG(mode):
        raise AntgmmError(f"{path} is not a regular file: replace it with one")


def check_size(path: Path, most: int = LARGEST_FILE, remedy: str = "copy it again") -> None:
    """Checks the size of a file before it is read.

    Args:
        path: the file.
        most: maximum number of bytes.
        remedy: what the user can do if it is larger.

    Raises:
        AntgmmError: it is larger.
    """
    if path.stat().st_size > most:
        raise AntgmmError(f"{path} has over {most >> 20} MB: {remedy}")


def read_json(path: Path, remedy: str = "copy it again", bounds: Bounds = FOREIGN) -> dict[str, Any]:
    """Reads a JSON object.

    Args:
        path: the file.
        remedy: what the user can do if it is damaged.
        bounds: larger files are refused.

    Raises:
        AntgmmError: the file is missing, too large, cannot be read, or is not a JSON object.
    """
    try:
        check_regular(path)
        check_size(path, bounds.size, remedy)
        raw = path.read_bytes()
        if raw.count(b"[") + raw.count(b"{") > bounds.parts:
            raise AntgmmError(f"{path} has over {bounds.parts} lists and objects: {remedy}")
        content = json.loads(raw.decode())
    except FileNotFoundError as error:
        raise AntgmmError(f"{path} is missing: every Hugging Face checkpoint has it") from error
    except OSError as error:
        raise AntgmmError(f"{path} cannot be read ({_reason(error)}): {remedy}") from error
    except (ValueError, RecursionError) as error:
        raise AntgmmError(f"{path} is not JSON ({_reason(error)}): {remedy}") from error
    if not isinstance(content, dict):
        raise AntgmmError(f"{path} contains a {type(content).__name__}, not a JSON object: {remedy}")
    return content


@contextmanager
def one_line(subject: Callable[[], str], remedy: str) -> Iterator[None]:
    """Turns every failure of a library that reads a checkpoint's files into one line.

    Args:
        subject: returns the start of the line, which names the file; called after a failure.
        remedy: what the user can do.

    Raises:
        AntgmmError: the block failed.
    """
    try:
        yield
    except (AntgmmError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of a Rust library is no Exception
        reason = " ".join(str(error).split())[:300] or "no message"
        raise AntgmmError(f"{subject()} ({type(error).__name__}: {reason}): {remedy}") from error


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
