"""Random access to rows of Parquet files; the row groups used last are kept in memory.

A value that a file holds once for many rows (in a dictionary) is also once in memory, so that about what a row group
takes is known before it is read.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import pyarrow
import pyarrow.parquet as pq

from antgmm_jax.errors import AntgmmError
from data.arrow_rows import all_rows, named_images, one_row, used_columns, value_bytes
from data.chat_rows import PATHS
from data.files import decode_image, files_digest, images_digest, inside
from data.kept import from_bytes, kept, to_bytes
from data.limits import GROUP_BYTES, check_group
from data.rows import ALIASES, image_names

_BUFFER = 1 << 20
"""Bytes that are read at once. Otherwise all compressed bytes of a row group are in memory beside the others."""
_BATCH = 1 << 16
"""Number of rows of which the image paths are read together."""
_VALUE_BYTES = 8
"""Memory of a value beside its text or bytes."""
_KEPT_BYTES, _LEAST = 2 * GROUP_BYTES, 2
"""Bytes of the row groups that are kept, and the number of those that are kept even if they have more."""


class _Group(NamedTuple):
    """A row group in memory, and the bytes of each of its rows, int64 [N]."""

    table: pyarrow.Table
    sizes: np.ndarray


class ParquetRows:
    """Rows of several Parquet files.

    Args:
        files: at least one file.
        images: folder that image paths are relative to and may not leave; None for that of the files.

    Raises:
        AntgmmError: a file cannot be read as Parquet.
    """

    def __init__(self, files: Sequence[Path], images: Path | None = None):
        self.files, self.folder = files, images or files[0].parent
        sizes = [_sizes(file) for file in files]
        self._rows = np.cumsum([0, *(sum(groups) for groups in sizes)])
        """Rows before each file."""
        self._groups = [(file, group) for file, groups in enumerate(sizes) for group in range(len(groups))]
        self._starts = np.cumsum([0, *(rows for groups in sizes for rows in groups)])
        self._kept, self._lock = OrderedDict[int, _Group](), Lock()
        """Row groups in memory, the one used last at the end."""

    def __len__(self) -> int:
        return int(self._rows[-1])

    def __getitem__(self, number: int) -> Any:
        group = int(np.searchsorted(self._starts, number, "right")) - 1
        with self._lock:  # else two threads would read the same group
            self._keep(group)
            table, sizes = self._kept[group]
        return one_row(table, number - int(self._starts[group]), sizes)

    def _keep(self, group: int) -> None:
        """Reads a row group unless it is kept, and forgets those that were not used for longest."""
        if group in self._kept:
            self._kept.move_to_end(group)
            return
        self._kept[group] = self._group(group)
        total = sum(one.table.get_total_buffer_size() for one in self._kept.values())
        while len(self._kept) > _LEAST and total > _KEPT_BYTES:
            total -= self._kept.popitem(last=False)[1].table.get_total_buffer_size()

    def __iter__(self) -> Iterator[Any]:
        return (self[number] for number in range(len(self)))

    def place(self, number: int) -> str:
        """Describes the position of a row for messages."""
        file = int(np.searchsorted(self._rows, number, "right")) - 1
        return f"{self.files[file].name} row {number - self._rows[file] + 1}"

    def picture(self, name: str | bytes) -> np.ndarray:
        """Reads an image of a row. Raises BadRow if it is missing or cannot be decoded."""
        return decode_image(name if isinstance(name, bytes) else inside(self.folder, name))

    def digest(self) -> str:
        """Returns a digest of names, sizes and times of the files, and of sizes and times of all image files."""
        return images_digest(files_digest(self.files), self.folder, self.named())

    def named(self) -> list[str]:
        """Returns the image paths in all rows."""
        names = kept("images of Parquet rows", self.files, lambda: {"names": to_bytes(self._image_names())})["names"]
        return from_bytes(names)

    def _image_names(self) -> Iterator[str]:
        for file in self.files:
            yield from _named_pictures(file)

    def _group(self, group: int) -> _Group:
        number, place = self._groups[group]
        file = self.files[number]
        return _opened(file, lambda table: _read_group(file, table, place, used_columns(file, table.schema_arrow)))


def _read_group(file: Path, table: pq.ParquetFile, group: int, names: list[str]) -> _Group:
    """Columns, or leaves of them, of a row group. Raises AntgmmError if its texts are too large: they may be shared."""
    rows, stored = table.read_row_group(group, names), file.stat().st_size
    sizes = {name: value_bytes(rows[name]) for name in rows.column_names}
    for name, each in sizes.items():
        if name not in ALIASES["image"]:
            check_group(f"{file}: column {name!r} of row group {group + 1}", int(each.sum()), stored)
    return _Group(rows, sum(sizes.values(), np.zeros(rows.num_rows, np.int64)))


def _named_pictures(file: Path) -> list[str]:
    """Image paths in the rows."""

    def read(table: pq.ParquetFile) -> Iterator[str]:
        leaves = _leaves_of(named_images(table.schema_arrow), table.metadata)
        for group in range(table.num_row_groups if leaves else 0):
            for batch in _read_group(file, table, group, leaves).table.to_batches(max_chunksize=_BATCH):
                yield from (name for row in all_rows(batch) for name in image_names(row))

    return _opened(file, lambda table: [*read(table)])


def _sizes(file: Path) -> list[int]:
    """Rows of each row group. Raises AntgmmError if a row group would take too much memory."""

    def read(table: pq.ParquetFile) -> list[int]:
        names, about, stored = used_columns(file, table.schema_arrow), table.metadata, file.stat().st_size
        used = [leaf for leaf in _leaves(about) if leaf.path.partition(".")[0] in names]
        # Values of a fixed length are repeated in memory.
        each = sum(max(_VALUE_BYTES, leaf.length) for leaf in used)
        groups = [about.row_group(number) for number in range(about.num_row_groups)]
        if any(group.num_rows < 0 for group in groups):
            raise ValueError("a row group has fewer than 0 rows")
        for number, group in enumerate(groups, 1):
            check_group(f"{file}: row group {number}", group.total_byte_size + group.num_rows * each, stored)
        return [group.num_rows for group in groups]

    return _opened(file, read)


def _leaves(about: pq.FileMetaData) -> list[pq.ColumnSchema]:
    """Columns of values. What describes them in a row group is not read: if damaged, it would end the process."""
    return [about.schema.column(place) for place in range(about.num_columns)]


def _leaves_of(schema: pyarrow.Schema, about: pq.FileMetaData) -> list[str]:
    """Columns of values in the columns of `named_images`."""
    paths = {leaf.path for leaf in _leaves(about) if leaf.path.partition(".")[0] in schema.names}
    beside = {f"{path.rpartition('.')[0]}.bytes" for path in paths if path.rpartition(".")[2] in PATHS}
    return sorted(paths - beside)


def _opened(file: Path, read) -> Any:
    try:
        about = pq.read_metadata(file)
        shared = [leaf.path for leaf in _leaves(about) if leaf.physical_type == "BYTE_ARRAY"]
        options = {"read_dictionary": shared, "buffer_size": _BUFFER, "pre_buffer": False}
        with pq.ParquetFile(file, metadata=about, **options) as table:
            return read(table)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise AntgmmError(f"{file} is not a readable Parquet file: {' '.join(str(error).split())[:200]}") from error
