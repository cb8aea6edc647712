"""Writes encoded images as long as their total size has a limit."""

import math
import shutil
from pathlib import Path

from antgmm_jax.io.shards import Writer

_SAMPLED = 1000
"""Number of rows after which the total size is estimated."""


class ImageWriter:
    """Writes encoded images; removes them again once their expected total size exceeds the limit.

    Args:
        folder: folder of the images.
        rows: number of rows.
        most: maximum total size in bytes; never more than half of the free disk. None for no other limit, infinity
            for none at all.
        written: size of the rows that an interrupted process wrote; it removed the folder if it was above the limit.

    Attributes:
        written: size of all rows so far, kept or not.
    """

    def __init__(self, folder: Path, rows: int, *, most: float | None, written: int = 0):
        free = (shutil.disk_usage(folder.parent).free + written) // 2
        self._folder, self._rows, self.written = folder, rows, written
        self._most = free if most is None else most if most == math.inf else min(most, free)
        self._writer = Writer(folder, 0) if folder.exists() else None

    def add(self, row: int, record: bytes) -> None:
        """Writes the images of a row, if those of the rows before it are kept."""
        self.written += len(record)
        expected = self.written * self._rows / (row + 1) if row >= _SAMPLED else 0
        if self._writer is not None and max(expected, self.written) > self._most:
            self._writer.flush()
            self._writer = None
            shutil.rmtree(self._folder)
        if self._writer is not None:
            self._writer.add(row, record)

    def flush(self) -> None:
        """Completes the current file."""
        if self._writer is not None:
            self._writer.flush()
