"""A user's own data: JSONL or JSON with image files, Parquet, WebDataset tar, prepared TFDS, as records by number."""

import hashlib
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from antgmm_jax.errors import AntgmmError
from data.json_rows import JsonRows
from data.parquet_rows import ParquetRows
from data.record import Record
from data.rows import BadRow, Row, parse
from data.source import Source
from data.tar_rows import TarRows
from data.tfds_rows import TfdsRows

_SUFFIXES = {"jsonl": (".jsonl", ".json"), "parquet": (".parquet",), "webdataset": (".tar",)}


class Table(Protocol):
    """Rows of files as they stand there: a row that cannot be parsed is given as a `BadRow`."""

    def __len__(self) -> int: ...
    def __getitem__(self, number: int) -> Any: ...
    def __iter__(self) -> Iterator[Any]: ...
    def place(self, number: int) -> str:
        """Where a row stands, for people."""
        ...

    def picture(self, name: str | bytes) -> np.ndarray:
        """A picture that a row names. Raises BadRow where there is none."""
        ...

    def digest(self) -> str:
        """A digest of what the rows are read from."""
        ...


class Places(NamedTuple):
    """Where the records of a table stand.

    Attributes:
        rows: row of each record, int64 [N].
        turns: which question of its row's conversation each is, int32 [N].
    """

    rows: np.ndarray
    turns: np.ndarray


class _Read(NamedTuple):
    """What one pass over a table gives: its records' places, the rows that are refused, and how many there were."""

    places: Places
    faults: dict[int, str]
    total: int


class FileSource(Source):
    """Records of a user's files by number; words and pictures are read when a record is asked for.

    Args:
        path: the file or folder that they come from, for people.
        table: its rows.
        most: how many records, the first ones; 0 for all.
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
        """Row and question of each record, learnt by a pass over the rows."""
        return self._places._asdict()

    def restore(self, places: Mapping[str, np.ndarray]) -> None:
        """Takes the places that an earlier process learnt of the same files: no pass is needed."""
        self._places = Places(**places)

    def __len__(self) -> int:
        return len(self._places.rows)

    def words(self, index: int) -> Row:
        """A record without its pictures. Raises AntgmmError where the row is bad."""
        try:
            return self._row(index)
        except BadRow as reason:
            raise self._refused(index, reason) from reason

    def __getitem__(self, index: int) -> Record:  # pyright: ignore[reportIncompatibleMethodOverride]
        try:
            return self.read(index)
        except BadRow as reason:
            raise self._refused(index, reason) from reason

    def read(self, index: int) -> Record:
        """A record. Raises BadRow where its row or a picture is bad."""
        row = self._row(index)
        return Record(**{**vars(row), "images": tuple(map(self._table.picture, row.images))})

    def digest(self) -> str:
        """A digest of the files, cheap beside reading all pictures: equal where nothing has changed."""
        return hashlib.sha256(f"{self._most} {self._table.digest()}".encode()).hexdigest()

    def check(self, bad: Mapping[int, str]) -> None:
        """Refuses bad rows together, and files that hold too few.

        Args:
            bad: record -> what is wrong with its pictures.

        Raises:
            AntgmmError: names each bad row with its reason.
        """
        faults = dict(self._read.faults)
        for index, reason in bad.items():
            faults.setdefault(int(self._places.rows[index]), reason)
        if faults:
            lines = (f"{self._table.place(row)}: {faults[row]}" for row in sorted(faults))
            head = f"{self.path}: {len(faults)} of {self._read.total} rows are refused; mend or remove them"
            raise AntgmmError("\n".join([head, *lines]))
        if not len(self):
            raise AntgmmError(f"{self.path} holds no rows: nothing to read")
        if len(self) < self._most:
            raise AntgmmError(f"{self.path} holds {len(self)} records, the recipe asks for {self._most}: lower samples")

    def _row(self, index: int) -> Row:
        row, turn = int(self._places.rows[index]), int(self._places.turns[index])
        found = _parsed(self._table[row])[turn]
        return found if found.id else replace(found, id=f"{self._table.place(row)}#{turn}")

    def _refused(self, index: int, reason: BadRow) -> AntgmmError:
        place = self._table.place(int(self._places.rows[index]))
        return AntgmmError(f"{self.path} has changed since it was read: {place}: {reason}")


def _parsed(raw: Any) -> list[Row]:
    if isinstance(raw, BadRow):
        raise raw
    return parse(raw)


def _pass(table: Table, most: int) -> _Read:
    """Reads the words of all rows once: which are records, and which are refused."""
    rows, turns, marks, faults, total = array("q"), array("i"), array("Q"), {}, 0
    for number, raw in enumerate(table):
        total += 1
        try:
            found = _parsed(raw)
        except BadRow as reason:
            faults[number] = str(reason)
            continue
        for turn, row in enumerate(found):
            rows.append(number)
            turns.append(turn)
            marks.append(_mark(row.id or f"\0{number}#{turn}"))
        if most and len(rows) >= most:
            break  # a conversation may go on behind it
    kept = slice(0, most or None)
    places = Places(np.array(rows[kept], np.int64), np.array(turns[kept], np.int32))
    faults |= _twice(table, places, np.array(marks[kept], np.uint64))
    good = ~np.isin(places.rows, [*faults])
    return _Read(Places(places.rows[good], places.turns[good]), faults, total)


def _mark(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest())


def _twice(table: Table, places: Places, marks: np.ndarray) -> dict[int, str]:
    """Rows with an id that an earlier row has: row -> reason."""
    order = np.argsort(marks, kind="stable")
    again = order[1:][marks[order[1:]] == marks[order[:-1]]]
    first = np.searchsorted(marks, marks[again], sorter=order)
    found = {}
    for index, earlier in zip(again.tolist(), order[first].tolist(), strict=True):
        row, before = int(places.rows[index]), int(places.rows[earlier])
        names = [parse(table[r])[int(places.turns[i])].id for r, i in ((row, index), (before, earlier))]
        if names[0] == names[1]:  # and not only their marks
            found[row] = f"id {names[0]!r} is also that of {table.place(before)}"
    return found


def read_records(kind: str, path: str | Path, *, split: str = "", most: int = 0) -> FileSource:
    """The records of a user's files by number; `data.store.every` checks them before anything is trained.

    A row needs pictures (one, a list, or an empty list for none), a question and an answer, under the names of
    `data.rows.ALIASES` or as `conversations`, where each question with its answer becomes a record. Other
    columns are not read.

    Args:
        kind: `jsonl` (also a JSON array; picture paths are relative to the file), `parquet` (pictures as bytes,
            as Hugging Face datasets writes them, or as paths), `webdataset` (tar: `KEY.jpg` and `KEY.json`), `tfds` (a
            prepared folder of array_record files).
        path: the file, or a folder that holds it; of Parquet and tar files a folder may hold several.
        split: which split, for `tfds`.
        most: how many records, the first ones; the files are read no further. 0 for all.

    Returns:
        The records.

    Raises:
        AntgmmError: no such files, or files of another form.
    """
    path = Path(path)
    if kind == "tfds":
        return FileSource(path, TfdsRows(path, split), most)
    if kind not in _SUFFIXES:
        raise AntgmmError(f"no reader for data of kind {kind!r}: choose one of {', '.join(_SUFFIXES)}, tfds")
    files = _files(path, kind)
    if kind == "jsonl":
        return FileSource(path, JsonRows(files[0]), most)
    return FileSource(path, (ParquetRows if kind == "parquet" else TarRows)(files), most)


def _files(path: Path, kind: str) -> list[Path]:
    suffixes = _SUFFIXES[kind]
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise AntgmmError(f"{path} does not exist: give the path of a {kind} file or of its folder")
    found = sorted(file for file in path.iterdir() if file.suffix in suffixes)
    if not found:
        raise AntgmmError(f"{path} holds no {' or '.join(suffixes)} file: give the folder that does")
    if kind == "jsonl" and len(found) > 1:
        raise AntgmmError(f"{path} holds {', '.join(f.name for f in found)}: name the file that is meant")
    return found
