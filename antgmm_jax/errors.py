"""The exception for errors that the user can fix."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

_OF_THE_DISK = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ESTALE),
    *(errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EEXIST, errno.EBUSY),
)


_OF_MEMORY = ("resource_exhausted", "out of memory", "failed to map segment", "cannot allocate memory", "memoryerror")
"""Words of XLA's errors, of which the class is that of all its errors, of PyTorch's, of libraries that cannot be
loaded, and of a MemoryError of the first process in the others."""
_LONGEST = 1000
"""Characters of a line; of a longer one, the middle is left out."""


class AntgmmError(Exception):
    """An error in the input or the environment; its one-line message names the cause and the remedy.

    The command line prints the message without a traceback and exits with `exit_code`. Names in a message may
    come from the files of a stranger, so line breaks in it are escaped, and a very long line is shortened.

    Args:
        message: the message.
        lines: faults that it lists, such as those of rows; each is printed on a line of its own.
    """

    exit_code = 2

    def __init__(self, message: str, *lines: str):
        super().__init__(message, *lines)

    def __str__(self) -> str:
        return "\n".join(map(_shown, self.args))


class OtherProcessError(AntgmmError):
    """An error of another process, which this one cannot name: starting all of them again may be enough."""

    exit_code = os.EX_TEMPFAIL


def _shown(line: str) -> str:
    half = _LONGEST // 2
    line = line if len(line) <= _LONGEST else f"{line[:half]} ... {line[-half:]}"
    return line.replace("\n", "\\n")


def disk_error(error: OSError, place: object = "a file") -> AntgmmError | None:
    """Returns the one-line error for a disk that is full, read-only, not permitted or broken; None for other errors.

    Args:
        error: error of a file.
        place: what was written, for an error that does not name its file.
    """
    if error.errno not in _OF_THE_DISK:
        return None
    return AntgmmError(f"{error.filename or place}: {error.strerror}; fix this and start again")


@contextmanager
def disk_errors(place: object = "a file") -> Iterator[None]:
    """Reports errors of the disk in one line.

    Args:
        place: as in `disk_error`.

    Raises:
        AntgmmError: the disk is full, read-only, not permitted or broken.
    """
    try:
        yield
    except OSError as error:
        if (line := disk_error(error, place)) is None:
            raise
        raise line from error


def memory_error(error: Exception) -> AntgmmError | None:
    """Returns the one-line error for memory that does not suffice, of NumPy or of a device; None for other errors.

    Args:
        error: error of a computation.
    """
    reason = " ".join(str(error).split())
    if not isinstance(error, MemoryError) and not any(words in reason.lower() for words in _OF_MEMORY):
        return None
    size = re.search(r"[\d.]+ ?(bytes|[KMGTP]?i?B)\b", reason)
    needed = f" for {size[0]}" if size else ""
    return AntgmmError(f"not enough memory{needed}: choose a smaller batch, fewer tokens or a larger machine")
