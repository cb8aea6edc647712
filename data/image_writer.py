"""Writes encoded images as long as their total size has a limit."""

import shutil
from pathlib import Path

from antgmm_jax.io.shards import Writer

_SAMPLED = 1000
"""Number of rows after which the total size is estimated."""


class ImageWriter:
    """Writes encoded images; removes them again once their expected total size exceeds the limit.

    Args:
        folder: an empty folder.
        rows: number of rows.
        most: maximum total size in bytes; never more than half of the free disk. None for no other limit.
    """

    def __init__(self, folder: Path, rows: int, *, most: int | None):
        free = shutil.disk_usage(folder).free // 2
        self._folder, self._rows, self._bytes = folder, rows, 0
        self._most = free if most is None else min(most, free)
        self._writer: Writer | None = Writer(folder, 0)

    def add(self, row: int, record: bytes) -> None:
        """Writes the images of a row, if those of the rows before it are kept."""
        self._bytes += len(record)
        expected = self._bytes * self._rows / (row + 1) if row >= _SAMPLED else 0
        if self._writer is not None and max(expected, self._bytes) > self._most:
            self._writer.flush()
            self._writer = None
            shutil.rmtree(self._folder)
        if self._writer is not None:
            self._writer.add(row, record)

    def finish(self) -> None:
        """Completes the files."""
        if self._writer is not None:
            self._writer.flush()
