"""Cache of encoded records: each record is read, checked and encoded only once.

A folder of the cache contains a data set encoded by one processor: `index.npz` with small arrays, and ArrayRecord files
with token ids and, if they fit, images. It is written under a hidden name and renamed.
"""

import hashlib
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from filelock import FileLock
from flax.serialization import msgpack_restore, msgpack_serialize

from antgmm_jax.errors import AntgmmError
from antgmm_jax.io import folders
from antgmm_jax.io.shards import Shards, Writer
from data.encoding import Encoder, TooLong, refuse
from data.files import BadRow
from data.image_writer import ImageWriter
from data.record import Arrays, Record
from data.source import Source

Result = TypeVar("Result")
Progress = Callable[[int, str], None]
Shown = Callable[[str, int], AbstractContextManager[Progress]]
MOST_BYTES = 4 << 30
"""Maximum size of the encoded images of a data set; images of larger data are decoded from their files every epoch."""
CACHE_BYTES = 16 << 30
"""Maximum size of the cache; the least recently used data sets are removed."""
THREADS = min(8, os.cpu_count() or 1)
_AHEAD = 4 * THREADS
_GROUP = 16
"""Rows of token ids (some hundred bytes each) that are read together."""


def _silent(done: int, note: str) -> None:
    """Shows no progress."""


class Index(NamedTuple):
    """Sizes and types of encoded records, kept in memory.

    Attributes:
        prompt: number of prompt tokens, including image tokens, int32 [N].
        answer: number of tokens of the last answer, including the end token, int32 [N].
        earlier: number of tokens of the answers in the prompt, int32 [N].
        slots: number of image slots, int32 [N].
        types: type of the question as an index into `names`, int32 [N].
        names: names of the types.
        fingerprint: digest of all token ids and pixels.
    """

    prompt: np.ndarray
    answer: np.ndarray
    earlier: np.ndarray
    slots: np.ndarray
    types: np.ndarray
    names: tuple[str, ...]
    fingerprint: str


_COLUMNS = ("prompt", "answer", "earlier", "slots", "types")
"""Fields of `Index` with a number for each record."""


def read_all(
    source: Source, function: Callable[[Record], Result], progress: Progress = _silent
) -> Iterator[tuple[int, Result]]:
    """Applies a function to all records of a source, ahead in threads; yields the results in order.

    Args:
        source: records.
        function: applied to each record.
        progress: called with the number of records read.

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
    with ThreadPoolExecutor(1 if source.drawn else THREADS) as pool:
        waiting: deque[Future[Result | BadRow]] = deque()
        for index in range(len(source) + _AHEAD):
            if index < len(source):
                waiting.append(pool.submit(one, index))
            if index < _AHEAD or not waiting:
                continue
            result, done = waiting.popleft().result(), index - _AHEAD
            if isinstance(result, BadRow):
                bad[done] = str(result)
            elif not bad:
                yield done, result
            progress(done + 1, "")
    source.check(bad)


class Encoded:
    """Encoded records by index.

    Args:
        source: records.
        encoder: encoder of the records.
        folder: complete folder of the cache.

    Attributes:
        source: records.
        encoder: encoder of the records.
        index: sizes and types of the records.
        kept: whether encoded images are in the cache, or else are decoded from their files.
        dropped: number of records of the source that were too long and are left out.
    """

    def __init__(self, source: Source, encoder: Encoder, folder: Path):
        self.source, self.encoder = source, encoder
        with np.load(folder / "index.npz") as file:
            arrays = dict(file)
        source.restore({name[len("places/") :]: x for name, x in arrays.items() if name.startswith("places/")})
        names, fingerprint = tuple(arrays["names"].tolist()), str(arrays["fingerprint"])
        self.index = Index(**{n: arrays[n] for n in _COLUMNS}, names=names, fingerprint=fingerprint)
        self.dropped = int(arrays["dropped"])
        self._tokens = Shards(folder / "tokens", len(self))
        self.kept = (folder / "images").exists()
        self._images = Shards(folder / "images", len(self)) if self.kept else None

    def __len__(self) -> int:
        return len(self.index.prompt)

    def __getitem__(self, index: int) -> Arrays:
        return {**self.tokens(index), "images": self.images(index)}

    def tokens(self, index: int) -> Arrays:
        """Returns an encoded record without its images."""
        return _restored(self._tokens[index])

    def images(self, index: int) -> Arrays:
        """Returns the images of an encoded record, leaves [M, ...]."""
        if self._images is not None:
            return _restored(self._images[index])
        return self.encoder.images(self.source[index])


def _restored(content: bytes) -> Arrays:
    arrays = msgpack_restore(content)
    assert isinstance(arrays, dict)  # for the type checker
    return arrays


def open_encoded(
    source: Source,
    encoder: Encoder,
    folder: Path | None = None,
    *,
    shown: Shown = lambda title, total: nullcontext(_silent),
) -> Encoded:
    """Opens encoded records in the cache; reads, checks and encodes all records first if they are not there.

    While one process encodes, others wait.

    Args:
        source: records.
        encoder: encoder of the records.
        folder: folder of the cache; default: `cache_folder()`.
        shown: creates a progress bar from a title and a total; used if records are encoded.

    Returns:
        The encoded records.

    Raises:
        AntgmmError: lists all bad records; or the disk is full.
    """
    folder = folder or cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    place = folder / hashlib.sha256(f"{source.digest()} {encoder.digest()}".encode()).hexdigest()[:32]
    with FileLock(place.with_suffix(".lock")):
        if not place.exists():
            _evict(folder)
            with shown(f"reading {source.path or 'records'}", len(source)) as progress:
                _build(source, encoder, place, progress)
        os.utime(place)
        return Encoded(source, encoder, place)


def cache_folder() -> Path:
    """Returns the folder of the cache of encoded data."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "antgmm-jax" / "data"


def _evict(folder: Path) -> None:
    """Removes old data sets from the cache. Other processes can still read their open files."""
    places = sorted((path for path in folder.iterdir() if path.is_dir()), key=lambda path: path.stat().st_mtime)
    sizes = {path: sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) for path in places}
    for path in places:
        if sum(sizes.values()) <= CACHE_BYTES:
            break
        if not path.name.startswith("."):  # being written
            folders.discard(path)
            path.with_suffix(".lock").unlink(missing_ok=True)
        sizes.pop(path)


def _build(source: Source, encoder: Encoder, place: Path, progress: Progress) -> None:
    partial = place.with_name(f".{place.name}.tmp")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        (partial / "tokens").mkdir(parents=True)
        (partial / "images").mkdir()
        source.restore(source.places())  # all records, also those that another encoder found too long
        index = _encode(source, encoder, partial, progress)
        np.savez(partial / "index.npz", **index)
        folders.publish(partial, place)
    except AntgmmError as error:
        raise AntgmmError(_with_path(source, str(error))) from error
    except OSError as error:
        raise AntgmmError(f"cannot write {place}: {error.strerror or error}; free space and start again") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _with_path(source: Source, reason: str) -> str:
    return reason if source.path is None or reason.startswith(str(source.path)) else f"{source.path}: {reason}"


def _encode(source: Source, encoder: Encoder, folder: Path, progress: Progress) -> dict[str, Any]:
    """Writes all records; returns the arrays of their index."""
    most = None if source.drawn else MOST_BYTES
    tokens, images_writer = Writer(folder / "tokens", 0, _GROUP), ImageWriter(folder / "images", len(source), most=most)
    digest, names, texts = hashlib.sha256(), {}, False
    with_image_token: list[tuple[str, str]] = []
    long: list[tuple[str, TooLong]] = []
    columns, kept = {name: np.zeros(len(source), np.int32) for name in _COLUMNS}, np.zeros(len(source), bool)
    count = 0

    def encoded(record: Record) -> tuple[Record, list[str], Arrays]:
        named = encoder.parts_with_image_token(record)
        return _light(record), named, {} if named else encoder(record)

    for row, (record, named, arrays) in read_all(source, encoded, progress):
        label = record.id or f"record {row + 1}"
        texts |= bool(record.text)
        with_image_token += [(label, part) for part in named]
        if named:
            continue
        too_long = encoder.too_long(arrays)
        long += [(label, part) for part in too_long]
        if with_image_token or too_long or (long and not source.drops_long):
            continue
        kind = names.setdefault(record.type, len(names))
        for name, value in zip(_COLUMNS, (*_lengths(arrays), kind), strict=True):
            columns[name][count] = value
        images = msgpack_serialize(arrays.pop("images"))
        for content in (rest := msgpack_serialize(arrays), images):
            digest.update(content)
        tokens.add(count, rest)
        images_writer.add(count, images)
        count, kept[row] = count + 1, True
    encoder.check_text(texts)
    refuse(with_image_token, () if source.drops_long and count else long, len(source), encoder.picture)
    tokens.flush()
    images_writer.finish()
    places = {f"places/{name}": value[kept] for name, value in source.places().items()}
    about = {"names": [*names], "fingerprint": digest.hexdigest()[:16], "dropped": len(kept) - count}
    return {name: column[:count] for name, column in columns.items()} | places | about


def _lengths(arrays: Arrays) -> tuple[int, int, int, int]:
    """Tokens of prompt, answer and earlier answers, and image slots."""
    slots = next((len(leaf) for leaf in arrays["images"].values()), 0)
    return len(arrays["prompt"]), len(arrays["answer"]), len(arrays.get("earlier", ())), slots


def _light(record: Record) -> Record:
    """Returns a record without its images, to save memory while it waits."""
    return Record(**{**vars(record), "images": (), "cells": None})
