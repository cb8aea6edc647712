"""Random access to rows of Parquet files; the two row groups used last are kept in memory."""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet as pq

from antgmm_jax.errors import AntgmmError
from data.arrow_rows import all_rows, named_images, one_row
from data.files import decode_image, files_digest, images_digest, inside
from data.kept import from_bytes, kept, to_bytes
from data.rows import columns, image_names


class ParquetRows:
    """Rows of several Parquet files.

    Args:
        files: at least one file; image paths are relative to their folder.

    Raises:
        AntgmmError: a file cannot be read as Parquet.
    """

    def __init__(self, files: Sequence[Path]):
        self.files, self._folder = files, files[0].parent
        sizes = [_sizes(file) for file in files]
        self._rows = np.cumsum([0, *(sum(groups) for groups in sizes)])
        """Rows before each file."""
        self._groups = [(file, group) for file, groups in enumerate(sizes) for group in range(len(groups))]
        self._starts = np.cumsum([0, *(rows for groups in sizes for rows in groups)])
        self._read, self._lock = lru_cache(maxsize=2)(self._group), Lock()

    def __len__(self) -> int:
        return int(self._rows[-1])

    def __getitem__(self, number: int) -> Any:
        group = int(np.searchsorted(self._starts, number, "right")) - 1
        with self._lock:  # else two threads would read the same group
            table = self._read(group)
        return one_row(table, number - int(self._starts[group]))

    def __iter__(self) -> Iterator[Any]:
        return (self[number] for number in range(len(self)))

    def place(self, number: int) -> str:
        """Describes the position of a row for messages."""
        file = int(np.searchsorted(self._rows, number, "right")) - 1
        return f"{self.files[file].name} row {number - self._rows[file] + 1}"

    def picture(self, name: str | bytes) -> np.ndarray:
        """Reads an image of a row. Raises BadRow if it is missing or cannot be decoded."""
        return decode_image(name if isinstance(name, bytes) else inside(self._folder, name))

    def digest(self) -> str:
        """Returns a digest of names, sizes and times of the files, and of sizes and times of all image files."""
        names = kept("images of Parquet rows", self.files, lambda: {"names": to_bytes(self._image_names())})["names"]
        return images_digest(files_digest(self.files), self._folder, from_bytes(names))

    def _image_names(self) -> Iterator[str]:
        for file in self.files:
            yield from _opened(file, lambda table: [*_named_pictures(table)])

    def _group(self, group: int) -> pyarrow.Table:
        file, place = self._groups[group]
        return _opened(self.files[file], lambda table: table.read_row_group(place, columns(table.schema_arrow.names)))


def _named_pictures(table: pq.ParquetFile) -> Iterator[str]:
    """Image paths in the rows."""
    if names := named_images(table.schema_arrow):
        for batch in table.iter_batches(columns=names):
            yield from (name for row in all_rows(batch) for name in image_names(row))


def _sizes(file: Path) -> list[int]:
    """Rows of each row group."""

    def read(table: pq.ParquetFile) -> list[int]:
        return [table.metadata.row_group(group).num_rows for group in range(table.num_row_groups)]

    return _opened(file, read)


def _opened(file: Path, read) -> Any:
    try:
        with pq.ParquetFile(file) as table:
            return read(table)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise AntgmmError(f"{file} is not a readable Parquet file: {' '.join(str(error).split())[:200]}") from error
