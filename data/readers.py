"""Readers of user data: JSONL or JSON with image files, Parquet, Arrow, WebDataset tar files, and TFDS folders."""

import hashlib
import json
import re
from array import array
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from os.path import isdir, isfile, lexists
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from antgmm_jax.errors import AntgmmError
from antgmm_jax.extras import require
from antgmm_jax.io.files import check_regular
from antgmm_jax.io.hub import local
from antgmm_jax.io.hub import parse as parse_name
from data.copies import contents, copied
from data.json_rows import JsonRows
from data.kept import Columns, kept
from data.limits import BadRow, quoted, short
from data.record import Record
from data.rows import Row, parse
from data.source import Source, evenly
from data.table import Table
from data.tar_rows import TarRows
from data.tfds_rows import TfdsRows

_SPLIT = re.compile(
    r"(?:^|[-_.])(training|train|validation|valid|val|dev|test|evaluation|eval)(?=[-_.\d]|$)", re.IGNORECASE
)
"""Name of a split as a word of a file's name; the last one counts (`dev-kit-train-00000-of-00010.parquet`)."""
_SHOWN = 1000
"""Invalid rows that are listed one by one; a file that begins with so many is not read to its end."""
_SUFFIXES = {"jsonl": (".jsonl", ".json"), "parquet": (".parquet",), "arrow": (".arrow",), "webdataset": (".tar",)}
_WITH_PATHS = ("jsonl", "parquet", "arrow")
"""Kinds of rows that may name image files."""
HELD_OUT = 10
"""One row in this many is in the split "test" of files that have no splits."""


class _Read(NamedTuple):
    """Result of a pass over a table: numbers of valid rows int64 [N], row -> error for invalid rows, and rows read."""

    rows: np.ndarray
    errors: dict[int, str]
    total: int


class FileSource(Source):
    """Random access to records of user files, which are read on access.

    Args:
        path: file or folder, for messages.
        table: rows of the files.
        most: maximum number of records; 0 for all.
        drops_long: whether records that are too long are left out.
        split: name of the split, if the files hold several; of other files, "train" or "test" for a part of the rows
            (`in_split`), or "" for all.
        spread: whether the records are at equal distances in the files, not the first ones.
    """

    def __init__(
        self,
        path: Path,
        table: Table,
        most: int = 0,
        *,
        drops_long: bool = False,
        split: str = "",
        spread: bool = False,
    ):
        self.path, self._table, self._most, self.drops_long, self._split = path, table, most, drops_long, split
        self._spread = spread

    @cached_property
    def _read(self) -> _Read:
        """Result of a pass over the rows, which takes minutes if there are many of them."""
        first = 0 if self._spread else self._most
        about = f"valid rows of {type(self._table).__name__} {self._split}, at most {first}"
        part = "" if isinstance(self._table, TfdsRows) else self._split
        scanned = kept(about, self._table.files, lambda: _columns(_pass(self._table, first, part)))
        errors = {int(row): reason for row, reason in json.loads(str(scanned["errors"])).items()}
        rows = scanned["rows"]
        if self._spread and 0 < self._most < len(rows):
            rows = rows[evenly(len(rows), self._most)]
        return _Read(rows, errors, int(scanned["total"]))

    @cached_property
    def _rows(self) -> np.ndarray:
        return self._read.rows

    def places(self) -> dict[str, np.ndarray]:
        """Returns the row numbers of all records, which requires a pass over the rows."""
        return {"rows": self._read.rows}

    def restore(self, places: Mapping[str, np.ndarray]) -> None:
        """Restores row numbers that an earlier process determined, to avoid a pass over the rows."""
        self._rows = places["rows"]

    def __len__(self) -> int:
        return len(self._rows)

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
        about = f"{self._most} {self.drops_long} {self._table.digest()}"
        spread = "spread" if self._spread else ""
        return hashlib.sha256(f"{about} {self._split} {spread}".rstrip().encode()).hexdigest()

    def origin(self) -> tuple[str, str]:
        """Returns a digest of the files, and the name of the split."""
        return self._table.digest(), self._split

    def contents(self) -> list[str]:
        """Returns digests of the contents of the files."""
        return contents(self._table)

    def overlaps(self, other: Source) -> bool:
        """Whether two sources have rows of equal files in common."""
        if not isinstance(other, FileSource):
            return super().overlaps(other)
        if {self._split, other._split} == {"train", "test"}:
            return False
        return self.origin() == other.origin() or copied(self._table, other._table)

    def check(self, bad: Mapping[int, str]) -> None:
        """Raises one error that lists all invalid rows, or if there are too few records.

        Args:
            bad: record number -> error of its images.

        Raises:
            AntgmmError: lists every invalid row with its error.
        """
        errors = dict(self._read.errors)
        for index, reason in bad.items():
            errors.setdefault(int(self._rows[index]), reason)
        if errors:
            shown = sorted(errors)[:_SHOWN]
            lines = [f"{short(self._table.place(row))}: {errors[row]}" for row in shown]
            more = Counter(errors[row] for row in sorted(errors)[_SHOWN:])
            lines += [f"{count} further rows: {reason}" for reason, count in more.most_common(_SHOWN)]
            missing = [text for text in bad.values() if text.startswith("image ") and text.endswith(" is missing")]
            remedy = "correct or remove them"
            if missing and len(missing) == len(self):
                remedy = f"their images are not in {self._table.folder}, name another folder with images"
            head = f"{self.path}: {len(errors)} of {self._read.total} rows are invalid; {remedy}"
            raise AntgmmError(head, *lines)
        if not len(self):
            part = (
                f" in its split {self._split!r}: name other rows for it (--test, or in the recipe)"
                if self._split
                else ""
            )
            raise AntgmmError(f"{self.path} has no rows{part}")
        if len(self) < self._most:
            raise AntgmmError(f"{self.path} has {len(self)} records, but samples = {self._most}: reduce samples")

    def _row(self, index: int) -> Row:
        number = int(self._rows[index])
        row = _parsed(self._table[number])
        if row.id and not row.turns:
            return row
        # Files with conversations repeat ids.
        place = self._table.place(number)
        return replace(row, id=f"{row.id} ({place})" if row.id else place)

    def _changed(self, index: int, reason: BadRow) -> AntgmmError:
        place = short(self._table.place(int(self._rows[index])))
        return AntgmmError(f"{self.path} has changed since it was read: {place}: {reason}")


def _parsed(raw: Any) -> Row:
    if isinstance(raw, BadRow):
        raise raw
    return parse(raw)


def in_split(row: Row, number: int, split: str) -> bool:
    """Whether a row belongs to a part of its file: about one row in ten is held out, by a digest of its first image.

    Rows with the same first image stay together, so that the first image of a test row is no first image in training. A
    further image of a row may be in both parts.

    Args:
        row: the row.
        number: its number in the file, which stands for a missing image.
        split: "train" or "test"; "" for all rows.
    """
    if not split:
        return True
    first = row.images[0] if row.images else f"row {number}"
    return (_id_hash(first) % HELD_OUT == 0) == (split == "test")


def _pass(table: Table, most: int, split: str) -> _Read:
    """Parses all rows once (without images) to determine records and invalid rows."""
    rows, hashes, errors, total = array("q"), array("Q"), {}, 0
    for number, raw in enumerate(table):
        total += 1
        try:
            row = _parsed(raw)
        except BadRow as reason:
            errors[number] = str(reason)
            if len(errors) == total == _SHOWN:
                break
            continue
        if not in_split(row, number, split):
            continue
        rows.append(number)
        hashes.append(_id_hash(f"\0{number}" if row.turns or not row.id else row.id))
        if len(rows) == most:
            break
    valid = np.array(rows, np.int64)
    errors |= _duplicates(table, valid, np.array(hashes, np.uint64))
    return _Read(valid[~np.isin(valid, [*errors])], errors, total)


def _columns(read: _Read) -> Columns:
    return {"rows": read.rows, "total": np.array(read.total), "errors": np.array(json.dumps(read.errors))}


def _id_hash(name: str | bytes) -> int:
    # The path of a picture may hold half a character, as Python names files that are not UTF-8.
    content = name if isinstance(name, bytes) else name.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest())


def _duplicates(table: Table, rows: np.ndarray, hashes: np.ndarray) -> dict[int, str]:
    """Finds rows with the id of an earlier row; returns row -> error."""
    order = np.argsort(hashes, kind="stable")
    again = order[1:][hashes[order[1:]] == hashes[order[:-1]]]
    first = np.searchsorted(hashes, hashes[again], sorter=order)
    errors = {}
    for row, before in zip(rows[again].tolist(), rows[order[first]].tolist(), strict=True):
        names = [parse(table[number]).id for number in (row, before)]
        if names[0] == names[1]:  # not just equal hashes
            errors[row] = f"id {quoted(names[0])} is also that of {short(table.place(before))}"
    return errors


def path_and_images(text: str) -> tuple[str, str]:
    """Splits PATH or PATH:images=DIR, as commands take it, into path and folder of the images ("" for none)."""
    path, _, images = text.partition(":images=")
    return path, images


def read_records(
    kind: str,
    path: str | Path,
    *,
    images: str = "",
    split: str = "",
    most: int = 0,
    drop_long: bool = False,
    spread: bool = False,
) -> FileSource:
    """Opens user files as a random-access source of records; `data.building.read_all` validates them.

    A row needs images (one, a list, or an empty list for none), a question and an answer under the names of
    `data.rows.ALIASES`, or a conversation under one of the names of `data.chat_rows.TURNS`, with or without images.
    Other columns are ignored.

    Args:
        kind: `jsonl` (or a JSON array), `parquet` (images as bytes, as written by Hugging Face datasets, or as paths),
            `arrow` (a folder of `datasets.save_to_disk`), `webdataset` (tar files with `KEY.jpg` and `KEY.json`), or
            `tfds` (a prepared folder of array_record files).
        path: the file, its folder (which may contain several Parquet, Arrow or tar files), or a pattern such as
            train-*.parquet; or one of these in a data set of the Hub, hf:ORG/NAME/PATH.
        images: folder that image paths are relative to and may not leave; "" for that of the file.
        split: split of a `tfds` folder; of other files, "train" or "test" for a part of the rows (`in_split`), or ""
            for all.
        most: maximum number of records; the rest is not read. 0 for all.
        drop_long: whether records that are too long for a model are left out; else they are an error.
        spread: whether these are at equal distances in the files, not the first ones; then all rows are read.

    Returns:
        The records.

    Raises:
        AntgmmError: the files do not exist or have another format, or the library that reads them is not installed.
    """
    options = {"drops_long": drop_long, "split": split, "spread": spread}
    return FileSource(Path(path), _table(kind, Path(path), split, images), most, **options)


def _table(kind: str, path: Path, split: str, images: str) -> Table:
    if kind not in (*_SUFFIXES, "tfds"):
        raise AntgmmError(f"unknown kind of data {kind!r}: choose one of {', '.join(_SUFFIXES)}, tfds")
    if images and (kind not in _WITH_PATHS or not isdir(images)):
        why = "is no folder" if kind in _WITH_PATHS else f"has no effect: rows of kind {kind} hold their images"
        raise AntgmmError(f"images {images} {why}")
    folder = Path(images) if images else None
    hint = ", such as hf:ORG/NAME/data" if parse_name(path) else ""
    path = local(path, kind)
    if kind == "tfds":
        return TfdsRows(path, split)
    if kind == "arrow":
        require("parquet")
        from data.arrow_rows import ArrowRows, data_files

        return ArrowRows(data_files(path) or _files(path, kind, hint), folder)
    files = _files(path, kind, hint)
    if kind == "jsonl":
        return JsonRows(files[0], folder)
    if kind == "webdataset":
        return TarRows(files)
    require("parquet")
    from data.parquet_rows import ParquetRows

    return ParquetRows(files, folder)


def _files(path: Path, kind: str, hint: str = "") -> list[Path]:
    suffixes = _SUFFIXES[kind]
    if isfile(path):
        return [path]
    pattern = "*" in path.name
    if not pattern and not isdir(path):
        if lexists(path):
            check_regular(path)
        raise AntgmmError(f"{path} does not exist: specify a {kind} file or its folder{hint}")
    files = sorted(path.parent.glob(path.name) if pattern else path.iterdir())
    files = [file for file in files if file.suffix in suffixes]
    if not files:
        verb = "matches" if pattern else "contains"
        if inner := sorted({file.parent for suffix in suffixes for file in path.glob(f"*/**/*{suffix}")})[:3]:
            raise AntgmmError(f"{path} has {kind} files in folders: specify one, such as {', '.join(map(str, inner))}")
        raise AntgmmError(f"{path} {verb} no {' or '.join(suffixes)} file: specify one that does")
    for file in files:
        check_regular(file)
    if kind == "jsonl" and len(files) > 1:
        raise AntgmmError(f"{path} contains {', '.join(f.name for f in files)}: specify one of these files")
    found = ((file, [*_SPLIT.finditer(file.stem)]) for file in files)
    splits = {words[-1][1].lower(): (file, words[-1].end()) for file, words in found if words}
    if len(splits) > 1 and not pattern:
        file, end = max(splits.items())[1]
        one = file.name if len(file.stem) == end else f"{file.stem[: end + 1]}*{file.suffix}"
        raise AntgmmError(
            f"{path} holds the splits {', '.join(sorted(splits))}, which are not to be mixed: specify the files of one,"
            f" such as {path / one}"
        )
    return files
