"""Readers of user data: JSONL or JSON with image files, Parquet, WebDataset tar files, and prepared TFDS folders."""

import hashlib
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from antgmm_jax.errors import AntgmmError
from antgmm_jax.extras import require
from data.files import BadRow
from data.json_rows import JsonRows
from data.record import Record
from data.rows import Row, parse
from data.source import Source
from data.tar_rows import TarRows
from data.tfds_rows import TfdsRows

_SUFFIXES = {"jsonl": (".jsonl", ".json"), "parquet": (".parquet",), "webdataset": (".tar",)}


@runtime_checkable
class Table(Protocol):
    """Random access to raw rows of files; rows that cannot be parsed are returned as `BadRow`."""

    def __len__(self) -> int: ...
    def __getitem__(self, number: int) -> Any: ...
    def __iter__(self) -> Iterator[Any]: ...
    def place(self, number: int) -> str:
        """Describes the position of a row for messages."""
        ...

    def picture(self, name: str | bytes) -> np.ndarray:
        """Reads an image of a row. Raises BadRow if it is missing or cannot be decoded."""
        ...

    def digest(self) -> str:
        """Returns a digest of the files; equal if nothing has changed."""
        ...


class Places(NamedTuple):
    """Positions of records in a table.

    Attributes:
        rows: row of each record, int64 [N].
        turns: number of the question in its row's conversation, int32 [N].
    """

    rows: np.ndarray
    turns: np.ndarray


class _Read(NamedTuple):
    """Result of a pass over a table: positions of records, row -> error for invalid rows, and number of rows read."""

    places: Places
    errors: dict[int, str]
    total: int


class FileSource(Source):
    """Random access to records of user files, which are read on access.

    Args:
        path: file or folder, for messages.
        table: rows of the files.
        most: maximum number of records; 0 for all.
    """

    def __init__(self, path: Path, table: Table, most: int = 0):
        self.path, self._table, self._most = path, table, most

    @cached_property
    def _read(self) -> _Read:
        return _pass(self._table, self._most)

    @cached_property
    def _places(self) -> Places:
        return self._read.places

    def places(self) -> dict[str, np.ndarray]:
        """Returns the positions of records, which requires a pass over the rows."""
        return self._places._asdict()

    def restore(self, places: Mapping[str, np.ndarray]) -> None:
        """Restores the positions that an earlier process determined, to avoid a pass over the rows."""
        self._places = Places(**places)

    def __len__(self) -> int:
        return len(self._places.rows)

    def words(self, index: int) -> Row:
        """Reads a record without its images. Raises AntgmmError if the row is invalid."""
        try:
            return self._row(index)
        except BadRow as reason:
            raise self._changed(index, reason) from reason

    def __getitem__(self, index: int) -> Record:  # pyright: ignore[reportIncompatibleMethodOverride]
        try:
            return self.read(index)
        except BadRow as reason:
            raise self._changed(index, reason) from reason

    def read(self, index: int) -> Record:
        """Reads a record. Raises BadRow if its row or an image is invalid."""
        row = self._row(index)
        return Record(**{**vars(row), "images": tuple(map(self._table.picture, row.images))})

    def digest(self) -> str:
        """Returns a digest of the files, without reading images; equal if nothing has changed."""
        return hashlib.sha256(f"{self._most} {self._table.digest()}".encode()).hexdigest()

    def check(self, bad: Mapping[int, str]) -> None:
        """Raises one error that lists all invalid rows, or if there are too few records.

        Args:
            bad: record number -> error of its images.

        Raises:
            AntgmmError: lists every invalid row with its error.
        """
        errors = dict(self._read.errors)
        for index, reason in bad.items():
            errors.setdefault(int(self._places.rows[index]), reason)
        if errors:
            lines = (f"{self._table.place(row)}: {errors[row]}" for row in sorted(errors))
            head = f"{self.path}: {len(errors)} of {self._read.total} rows are invalid; correct or remove them"
            raise AntgmmError("\n".join([head, *lines]))
        if not len(self):
            raise AntgmmError(f"{self.path} has no rows")
        if len(self) < self._most:
            raise AntgmmError(f"{self.path} has {len(self)} records, but samples = {self._most}: reduce samples")

    def _row(self, index: int) -> Row:
        row, turn = int(self._places.rows[index]), int(self._places.turns[index])
        record = _parsed(self._table[row])[turn]
        return record if record.id else replace(record, id=f"{self._table.place(row)}#{turn}")

    def _changed(self, index: int, reason: BadRow) -> AntgmmError:
        place = self._table.place(int(self._places.rows[index]))
        return AntgmmError(f"{self.path} has changed since it was read: {place}: {reason}")


def _parsed(raw: Any) -> list[Row]:
    if isinstance(raw, BadRow):
        raise raw
    return parse(raw)


def _pass(table: Table, most: int) -> _Read:
    """Parses all rows once (without images) to determine records and invalid rows."""
    rows, turns, hashes, errors, total = array("q"), array("i"), array("Q"), {}, 0
    for number, raw in enumerate(table):
        total += 1
        try:
            records = _parsed(raw)
        except BadRow as reason:
            errors[number] = str(reason)
            continue
        for turn, row in enumerate(records):
            rows.append(number)
            turns.append(turn)
            hashes.append(_id_hash(row.id or f"\0{number}#{turn}"))
        if most and len(rows) >= most:
            break  # the last conversation may have more records
    kept = slice(0, most or None)
    places = Places(np.array(rows[kept], np.int64), np.array(turns[kept], np.int32))
    errors |= _duplicates(table, places, np.array(hashes[kept], np.uint64))
    good = ~np.isin(places.rows, [*errors])
    return _Read(Places(places.rows[good], places.turns[good]), errors, total)


def _id_hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest())


def _duplicates(table: Table, places: Places, hashes: np.ndarray) -> dict[int, str]:
    """Finds rows with the id of an earlier row; returns row -> error."""
    order = np.argsort(hashes, kind="stable")
    again = order[1:][hashes[order[1:]] == hashes[order[:-1]]]
    first = np.searchsorted(hashes, hashes[again], sorter=order)
    errors = {}
    for index, earlier in zip(again.tolist(), order[first].tolist(), strict=True):
        row, before = int(places.rows[index]), int(places.rows[earlier])
        names = [parse(table[r])[int(places.turns[i])].id for r, i in ((row, index), (before, earlier))]
        if names[0] == names[1]:  # not just equal hashes
            errors[row] = f"id {names[0]!r} is also that of {table.place(before)}"
    return errors


def read_records(kind: str, path: str | Path, *, split: str = "", most: int = 0) -> FileSource:
    """Opens user files as a random-access source of records; `data.store.every` validates them.

    A row needs images (one, a list, or an empty list for none), a question and an answer under the names of
    `data.rows.ALIASES`, or `conversations`, in which every question with its answer is a record. Other columns are
    ignored.

    Args:
        kind: `jsonl` (or a JSON array; image paths are relative to the file), `parquet` (images as bytes, as written by
            Hugging Face datasets, or as paths), `webdataset` (tar files with `KEY.jpg` and `KEY.json`), or `tfds` (a
            prepared folder of array_record files).
        path: the file, or its folder; a folder may contain several Parquet or tar files.
        split: split of a `tfds` folder.
        most: maximum number of records; the rest is not read. 0 for all.

    Returns:
        The records.

    Raises:
        AntgmmError: the files do not exist or have another format, or the library that reads them is not installed.
    """
    path = Path(path)
    if kind == "tfds":
        return FileSource(path, TfdsRows(path, split), most)
    if kind not in _SUFFIXES:
        raise AntgmmError(f"unknown kind of data {kind!r}: choose one of {', '.join(_SUFFIXES)}, tfds")
    files = _files(path, kind)
    if kind == "jsonl":
        return FileSource(path, JsonRows(files[0]), most)
    if kind == "webdataset":
        return FileSource(path, TarRows(files), most)
    require("parquet")
    from data.parquet_rows import ParquetRows

    return FileSource(path, ParquetRows(files), most)


def _files(path: Path, kind: str) -> list[Path]:
    suffixes = _SUFFIXES[kind]
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise AntgmmError(f"{path} does not exist: specify a {kind} file or its folder")
    files = sorted(file for file in path.iterdir() if file.suffix in suffixes)
    if not files:
        raise AntgmmError(f"{path} contains no {' or '.join(suffixes)} file: specify the folder that does")
    if kind == "jsonl" and len(files) > 1:
        raise AntgmmError(f"{path} contains {', '.join(f.name for f in files)}: specify one of these files")
    return files
