"""A user's own data: JSONL or JSON with image files, Parquet, WebDataset tar, prepared TFDS, as records."""

import json
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any, overload

import numpy as np
import pyarrow
import pyarrow.parquet as pq

from antgmm_jax.errors import AntgmmError
from data.record import Record
from data.rows import BadRow, Row, columns, decode_image, inside, parse

_SUFFIXES = {"jsonl": (".jsonl", ".json"), "parquet": (".parquet",), "webdataset": (".tar",)}
_PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")
Load = Callable[[Row], np.ndarray]
Numbered = Iterator[tuple[str, Any]]


class FileSource(Sequence[Record]):
    """Records of files, all checked; a picture is decoded when its record is asked for.

    Attributes:
        path: the file or folder that they come from.
        rows: the records without their pictures.
    """

    def __init__(self, path: Path, rows: Sequence[Row], load: Load):
        self.path, self.rows, self._load = path, rows, load

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> "FileSource": ...
    def __getitem__(self, index):
        if isinstance(index, slice):
            return FileSource(self.path, self.rows[index], self._load)
        row = self.rows[index]
        return Record(**{**vars(row), "image": self._load(row)})


def read_records(kind: str, path: str | Path, *, split: str = "", most: int = 0) -> Sequence[Record]:
    """The records of a user's files, each row checked before anything is trained.

    A row needs a picture, a question and an answer, under the names of `data.rows.ALIASES` or as LLaVA's
    `conversations`, where each question with its answer becomes a record. Other columns are not read.

    Args:
        kind: `jsonl` (also a JSON array; picture paths are relative to the file), `parquet` (pictures as bytes,
            as Hugging Face datasets writes them, or as paths), `webdataset` (tar: `KEY.jpg` and `KEY.json`), `tfds` (a
            prepared folder of array_record files).
        path: the file, or a folder that holds it; of Parquet and tar files a folder may hold several.
        split: which split, for `tfds`.
        most: how many records, the first ones; the files are read no further. 0 for all.

    Returns:
        The records; pictures are decoded as they are asked for.

    Raises:
        AntgmmError: no such files, nothing in them, or bad rows: all of them, each with its reason.
    """
    path = Path(path)
    if kind == "tfds":
        return _checked(path, *_tfds(path, split), most)
    if kind not in _SUFFIXES:
        raise AntgmmError(f"no reader for data of kind {kind!r}: choose one of {', '.join(_SUFFIXES)}, tfds")
    files = _files(path, kind)
    folder = files[0].parent
    if kind == "jsonl":
        return _checked(path, _json(files[0]), _loader(folder), most)
    read = _parquet if kind == "parquet" else _tar
    return _checked(path, (row for file in files for row in read(file)), _loader(folder), most)


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


def _loader(folder: Path) -> Load:
    def load(row: Row) -> np.ndarray:
        return decode_image(row.image if isinstance(row.image, bytes) else inside(folder, row.image))

    return load


def _checked(path: Path, numbered: Numbered, load: Load, most: int) -> FileSource:
    """Parses rows and opens their pictures; refuses them together."""
    rows: list[Row] = []
    bad: list[str] = []
    seen: dict[str, str] = {}
    total = 0
    for place, raw in numbered:
        total += 1
        try:
            if isinstance(raw, BadRow):
                raise raw
            found = [row if row.id else replace(row, id=f"{place}#{k}") for k, row in enumerate(parse(raw))]
            load(found[0])
            for row in found:
                if row.id in seen:
                    raise BadRow(f"id {row.id!r} is also that of {seen[row.id]}")
            seen |= {row.id: place for row in found}
            rows += found
        except BadRow as reason:
            bad.append(f"{place}: {reason}")
        if most and len(rows) >= most:
            rows = rows[:most]  # a conversation may go on behind it
            break
    if bad:
        raise AntgmmError(f"{path}: {len(bad)} of {total} rows are refused; mend or remove them\n" + "\n".join(bad))
    if not rows:
        raise AntgmmError(f"{path} holds no rows: nothing to read")
    return FileSource(path, rows, load)


def _json(file: Path) -> Numbered:
    """The objects of a JSON array, or of the lines of a file, with their places."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise AntgmmError(f"{file} is not UTF-8 text (byte {error.start}): save it as UTF-8") from error
    if file.suffix == ".json":
        try:
            found = json.loads(text)
        except ValueError as error:
            raise AntgmmError(f"{file} is not JSON: {error}") from error
        if not isinstance(found, list):
            raise AntgmmError(f"{file} is not a JSON array of rows: write an array, or one object a line as .jsonl")
        yield from ((f"row {number}", raw) for number, raw in enumerate(found, 1))
        return
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield f"line {number}", json.loads(line)
        except ValueError as error:
            yield f"line {number}", BadRow(f"is not JSON: {error}")


def _parquet(file: Path) -> Numbered:
    try:
        with pq.ParquetFile(file) as table:
            wanted, number = columns(table.schema_arrow.names), 0
            for batch in table.iter_batches(batch_size=256, columns=wanted):
                for raw in batch.to_pylist():
                    number += 1
                    yield f"{file.name} row {number}", raw
    except (pyarrow.ArrowException, OSError) as error:
        raise AntgmmError(f"{file} is not a readable Parquet file: {' '.join(str(error).split())[:200]}") from error


def _tar(file: Path) -> Numbered:
    """Samples of a WebDataset shard: neighbouring members whose names agree up to the first dot."""
    try:
        with tarfile.open(file) as archive:
            key, parts = None, {}
            for member in archive:
                name = PurePosixPath(member.name)
                if not member.isfile() or name.name.startswith("."):  # what macOS puts beside each file
                    continue
                stem, _, suffix = name.name.partition(".")
                found = str(name.with_name(stem))
                if found != key and parts:
                    yield f"{file.name} {key}", _sample(parts)
                    parts = {}
                key = found
                stream = archive.extractfile(member)
                parts[f".{suffix.lower()}"] = stream.read() if stream else b""
            if parts:
                yield f"{file.name} {key}", _sample(parts)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise AntgmmError(f"{file} is not a readable tar file: {' '.join(str(error).split())[:200]}") from error


def _sample(parts: dict[str, bytes]) -> Any:
    pictures = [suffix for suffix in parts if suffix in _PICTURES]
    if len(pictures) != 1 or ".json" not in parts:
        return BadRow(f"needs one picture and a .json, has {', '.join(sorted(parts))}")
    try:
        fields = json.loads(parts[".json"])
    except ValueError as error:
        return BadRow(f".json is not JSON: {error}")
    return {**fields, "image": parts[pictures[0]]} if isinstance(fields, dict) else fields


def _tfds(path: Path, split: str) -> tuple[Numbered, Load]:
    """Rows of a prepared folder; pictures stay in their files until asked for."""
    from data.maad.maad_synth import open_split

    found = open_split(path, split)

    def numbered() -> Numbered:
        for place in range(len(found)):
            fields = {name: value for name, value in found[place].items() if name not in ("image", "latents")}
            fields = {name: value.decode() if isinstance(value, bytes) else value for name, value in fields.items()}
            latents = {name: int(number) for name, number in found[place].get("latents", {}).items()}
            yield f"{split} row {place}", {**fields, "latents": latents, "image": str(place)}

    def load(row: Row) -> np.ndarray:
        return np.asarray(found[int(row.image)]["image"])

    return numbered(), load
