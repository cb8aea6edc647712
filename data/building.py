"""Reading, checking and encoding of all records into a folder; an interrupted build continues where it stopped."""

import hashlib
import json
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from flax.serialization import msgpack_serialize

from antgmm_jax.errors import AntgmmError
from antgmm_jax.io import folders
from antgmm_jax.io.books import write_book
from antgmm_jax.io.shards import Writer
from data.encoding import Encoder, LongRow, TooLong, refuse
from data.image_writer import ImageWriter
from data.index import COLUMNS, read_arrays
from data.limits import BadRow, short
from data.record import Arrays, Record, Turn
from data.rows import Row
from data.source import Source

Result = TypeVar("Result")
Progress = Callable[[int, str], None]
PART = 4096
"""Records between points from which an interrupted build can resume."""
GROUP = 16
"""Rows of token ids (some hundred bytes each) that are read together."""
_DIGEST = 16


def silent(done: int, note: str) -> None:
    """Shows no progress."""


def read_all(
    source: Source,
    function: Callable[[Record], Result],
    progress: Progress = silent,
    *,
    threads: int = 1,
    first: int = 0,
) -> Iterator[tuple[int, Result]]:
    """Applies a function to all records of a source, ahead in threads; yields the results in order.

    Args:
        source: records.
        function: applied to each record.
        progress: called with the number of records read.
        threads: number of threads.
        first: number of the record to begin with.

    Yields:
        Index and result; nothing after the first bad record, but the remaining records are still checked.

    Raises:
        AntgmmError: at the end, lists all bad records.
    """

    def one(index: int) -> Result | BadRow:
        try:
            return function(source.read(index))
        except BadRow as reason:
            return reason

    bad: dict[int, str] = {}
    ahead = 4 * threads
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[Result | BadRow]] = deque()
        for index in range(first, len(source) + ahead):
            if index < len(source):
                waiting.append(pool.submit(one, index))
            if index < first + ahead or not waiting:
                continue
            result, done = waiting.popleft().result(), index - ahead
            if isinstance(result, BadRow):
                bad[done] = str(result)
            elif not bad:
                yield done, result
            progress(done + 1, "")
    source.check(bad)


class _Done(NamedTuple):
    """Progress of a build.

    Attributes:
        rows: records of the source that are read.
        kept: records that are stored.
        names: names of the question types.
        texts: whether a record has a text.
        image_bytes: size of the encoded images.
    """

    rows: int = 0
    kept: int = 0
    names: tuple[str, ...] = ()
    texts: bool = False
    image_bytes: int = 0


def build(
    source: Source,
    encoder: Encoder,
    place: Path,
    progress: Progress,
    *,
    most: float | None,
    threads: int = 1,
    about: Mapping[str, Any] | None = None,
) -> None:
    """Reads, checks and encodes all records, and stores them in a folder.

    Args:
        source: records.
        encoder: encoder of the records.
        place: the folder. Until it is complete, its hidden name is that of `partial_of`.
        progress: called with the number of records read.
        most: see `ImageWriter`; images are left out if they are larger.
        threads: number of threads.
        about: contents of `prepared.json`, to which the number of records and the sizes of the files are added, for a
            folder that also has the texts of the records; None for a folder without these.

    Raises:
        AntgmmError: lists all bad records, and the partial folder is removed; or the disk is full, and another call
            resumes.
    """
    partial = partial_of(place)
    try:
        source.restore(source.places())  # all records, also those that are too long for another encoder
        done = _begin(partial, about)
        _Build(source, encoder, partial, done, most, threads).run(progress)
        count = _finish(source, partial)
        if about is not None:
            files = {path.relative_to(partial).as_posix(): path.stat().st_size for path in _written(partial)}
            write_book(partial / "prepared.json", {**about, "records": count, "files": files})
        folders.publish(partial, place)
        shutil.rmtree(place / "parts")
    except folders.Unwritten:
        raise
    except AntgmmError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise AntgmmError(_with_path(source, str(error.args[0])), *error.args[1:]) from error
    except OSError as error:
        raise AntgmmError(f"cannot write {place}: {error.strerror or error}; free space and start again") from error


def partial_of(place: Path) -> Path:
    """Returns the name of a folder while it is being built."""
    return place.with_name(f".{place.name}.tmp")


def _with_path(source: Source, reason: str) -> str:
    return reason if source.path is None or reason.startswith(str(source.path)) else f"{source.path}: {reason}"


def _written(partial: Path) -> list[Path]:
    """Files of a finished folder."""
    return sorted(path for path in partial.rglob("*") if path.is_file() and path.parent.name != "parts")


def _begin(partial: Path, about: Mapping[str, Any] | None) -> _Done:
    """Creates the folder, or removes what an interrupted process left half-written. Returns what is done of the rows.

    Args:
        partial: the folder.
        about: as in `build`; what was done of other rows, which have other digests, is removed. Without it, the name of
            the folder is that of the rows.
    """
    parts, note, rows = sorted((partial / "parts").glob("*.npz")), partial / "parts" / "about.json", json.dumps(about)
    if not parts or not note.exists() or note.read_text() != rows:
        shutil.rmtree(partial, ignore_errors=True)
        for name in ("tokens", "images", "parts", *(() if about is None else ("words",))):
            (partial / name).mkdir(parents=True)
        note.write_text(rows)
        return _Done()
    for leftover in partial.rglob(".*.tmp"):
        leftover.unlink()
    done = json.loads(str(read_arrays(parts[-1])["done"]))
    return _Done(**{**done, "names": tuple(done["names"])})


class _Build:
    """Encoding of the records that are not stored yet."""

    def __init__(self, source: Source, encoder: Encoder, folder: Path, done: _Done, most: float | None, threads: int):
        self._source, self._encoder, self._folder, self._done, self._threads = source, encoder, folder, done, threads
        self._tokens = Writer(folder / "tokens", 0, GROUP)
        self._images = ImageWriter(folder / "images", len(source), most=most, written=done.image_bytes)
        self._words = Writer(folder / "words", 0, GROUP) if (folder / "words").exists() else None
        self._names = {name: number for number, name in enumerate(done.names)}
        self._texts, self._count = done.texts, done.kept
        self._special: list[tuple[str, tuple[str, str]]] = []
        self._long: list[tuple[str, TooLong]] = []
        self._clear()

    def _clear(self) -> None:
        self._columns: list[tuple[int, ...]] = []
        self._digests: list[bytes] = []
        self._kept: list[bool] = []

    def run(self, progress: Progress) -> None:
        """Encodes the records. Raises AntgmmError if some are invalid."""
        threads = 1 if self._source.drawn else self._threads
        rows = read_all(self._source, self._encoded, progress, threads=threads, first=self._done.rows)
        for row, (record, special, long, arrays) in rows:
            self._add(short(record.id) or f"record {row + 1}", record, special, long, arrays)
            if (row + 1) % PART == 0 and self._count and not self._special and not self._refused:
                self._write_part(row + 1)
        self._encoder.check_text(self._texts)
        long = self._long if self._refused or not self._count else ()
        refuse(self._special, long, len(self._source))
        if self._kept or not self._count:
            self._write_part(len(self._source))

    @property
    def _refused(self) -> bool:
        """Whether a record is too long, and such records are errors."""
        return bool(self._long) and not self._source.drops_long

    def _encoded(self, record: Record) -> tuple[Record, list[tuple[str, str]], list[TooLong], Arrays]:
        """The record, its parts with special tokens, those that are too long, and its arrays, empty if it is not read.

        Raises:
            BadRow: the record is invalid.
        """
        special = self._encoder.special_parts(record)
        # Without its images, to save memory while it waits.
        light = Record(**{**vars(record), "images": (), "cells": None})
        if special:
            return light, special, [], {}
        try:
            arrays = self._encoder(record)
        except LongRow as error:
            return light, [], [error.part], {}
        return light, [], self._encoder.too_long(arrays), arrays

    def _add(
        self, label: str, record: Record, special: list[tuple[str, str]], too_long: list[TooLong], arrays: Arrays
    ) -> None:
        self._texts |= bool(record.text)
        self._special += [(label, part) for part in special]
        self._long += [(label, part) for part in too_long]
        self._kept.append(not (special or too_long))
        if self._special or too_long or self._refused:
            return
        kind = self._names.setdefault(record.type, len(self._names))
        self._columns.append((*_lengths(arrays), kind))
        images = msgpack_serialize(arrays.pop("images"))
        rest = msgpack_serialize(arrays)
        scored = f"{record.type}\0{record.slice}\0{record.answer}\0".encode()
        self._digests.append(hashlib.blake2b(scored + rest + images, digest_size=_DIGEST).digest())
        self._tokens.add(self._count, rest)
        self._images.add(self._count, images)
        if self._words is not None:
            self._words.add(self._count, _words(record))
        self._count += 1

    def _write_part(self, rows: int) -> None:
        """Writes files of the rows since the last part, then the part, with which a later process resumes."""
        self._tokens.flush()
        self._images.flush()
        if self._words is not None:
            self._words.flush()
        done = _Done(rows, self._count, tuple(self._names), self._texts, self._images.written)
        columns = np.array(self._columns, np.int32).reshape(-1, len(COLUMNS)).T
        with folders.new_file(self._folder / "parts" / f"{rows:012d}.npz") as path, path.open("wb") as file:
            np.savez(
                file,
                done=np.array(json.dumps(done._asdict())),
                kept=np.array(self._kept, bool),
                digests=np.frombuffer(b"".join(self._digests), np.uint8),
                **dict(zip(COLUMNS, columns, strict=True)),  # pyright: ignore[reportArgumentType]
            )
        self._clear()


def _finish(source: Source, partial: Path) -> int:
    """Joins the parts to the index of the folder. Returns the number of records."""
    joined: dict[str, list[np.ndarray]] = {name: [] for name in (*COLUMNS, "kept", "digests", "done")}
    for part in sorted((partial / "parts").glob("*.npz")):
        arrays = read_arrays(part)
        for name, pieces in joined.items():
            pieces.append(arrays[name])
    names = json.loads(str(joined.pop("done")[-1]))["names"]
    columns = {name: np.concatenate(pieces) for name, pieces in joined.items()}
    kept, digests = columns.pop("kept"), columns.pop("digests")
    places: dict[str, Any] = {f"places/{name}": value[kept] for name, value in source.places().items()}
    fingerprint = hashlib.sha256(digests.tobytes()).hexdigest()[:16]
    about = {"names": names, "fingerprint": fingerprint, "dropped": int((~kept).sum())}
    np.savez(partial / "index.npz", **columns, **places, **about)
    return int(kept.sum())


def _lengths(arrays: Arrays) -> tuple[int, int, int, int]:
    """Tokens of prompt, answer and earlier answers, and image slots."""
    slots = next((len(leaf) for leaf in arrays["images"].values()), 0)
    return len(arrays["prompt"]), len(arrays["answer"]), len(arrays.get("earlier", ())), slots


def _words(record: Record) -> bytes:
    """Texts of a record as JSON."""
    fields = {name: value for name, value in vars(record).items() if name not in ("images", "cells")}
    return json.dumps({**fields, "latents": dict(record.latents)}).encode()


def row_of(words: bytes) -> Row:
    """Returns a stored record without its images."""
    fields = json.loads(words)
    turns = tuple(Turn(role, tuple(parts)) for role, parts in fields.pop("turns"))
    return Row(images=(), turns=turns, **fields)
