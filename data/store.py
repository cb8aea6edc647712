"""Encoded records by number: each is read, checked and encoded once, and a later run finds that done.

A folder of the cache holds what one data set is for one processor: `index.npz`, small arrays with a value a record, and
token ids and, where they fit, pictures in ArrayRecord files. It is written under a hidden name and renamed.
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
from data.encoding import Encoder, Long, refuse
from data.record import Arrays, Record
from data.rows import BadRow
from data.source import Source

Made = TypeVar("Made")
Progress = Callable[[int, str], None]
Shown = Callable[[str, int], AbstractContextManager[Progress]]
MOST_BYTES = 4 << 30
"""Of pictures that are kept encoded; those of larger data are decoded from their files once an epoch."""
_SAMPLED = 1000
"""Rows that tell how large all are."""
CACHE_BYTES = 16 << 30
"""Of all data sets that are kept; those that were not read for the longest time go first."""
THREADS = min(8, os.cpu_count() or 1)
_AHEAD = 4 * THREADS
_GROUP = 16
"""Rows of token ids, some hundred bytes each, that are read from disk together."""


def _silent(done: int, note: str) -> None:
    """No progress is shown."""


class Index(NamedTuple):
    """What is held in memory of encoded records: a number each.

    Attributes:
        prompt: tokens of the prompt, those of pictures among them, int32 [N].
        answer: tokens of the answer, the end token among them, int32 [N].
        slots: picture slots, int32 [N].
        types: type of the question, an index into `names`, int32 [N].
        names: of the types.
        fingerprint: digest of all token ids and pixels.
    """

    prompt: np.ndarray
    answer: np.ndarray
    slots: np.ndarray
    types: np.ndarray
    names: tuple[str, ...]
    fingerprint: str


def every(source: Source, work: Callable[[Record], Made], progress: Progress = _silent) -> Iterator[tuple[int, Made]]:
    """All records of a source in order, read and worked on ahead in threads.

    Args:
        source: the records.
        work: what is made of each.
        progress: called with the number of records read.

    Yields:
        Number and what was made; after the first bad record nothing, while the others are looked at.

    Raises:
        AntgmmError: at the end, for all bad records together.
    """

    def one(index: int) -> Made | BadRow:
        try:
            return work(source.read(index))
        except BadRow as reason:
            return reason

    bad: dict[int, str] = {}
    with ThreadPoolExecutor(1 if source.drawn else THREADS) as pool:
        waiting: deque[Future[Made | BadRow]] = deque()
        for index in range(len(source) + _AHEAD):
            if index < len(source):
                waiting.append(pool.submit(one, index))
            if index < _AHEAD or not waiting:
                continue
            made, done = waiting.popleft().result(), index - _AHEAD
            if isinstance(made, BadRow):
                bad[done] = str(made)
            elif not bad:
                yield done, made
            progress(done + 1, "")
    source.check(bad)


class Encoded:
    """Encoded records by number.

    Args:
        source: the records.
        encoder: encodes them.
        folder: of the cache, complete.

    Attributes:
        source: as given.
        encoder: as given.
        index: a number of each record.
        kept: whether the pictures are read encoded, not decoded from their files.
    """

    def __init__(self, source: Source, encoder: Encoder, folder: Path):
        self.source, self.encoder = source, encoder
        with np.load(folder / "index.npz") as found:
            arrays = dict(found)
        source.restore({name[len("places/") :]: x for name, x in arrays.items() if name.startswith("places/")})
        names, fingerprint = tuple(arrays["names"].tolist()), str(arrays["fingerprint"])
        self.index = Index(**{n: arrays[n] for n in Index._fields[:4]}, names=names, fingerprint=fingerprint)
        self._tokens = Shards(folder / "tokens", len(self))
        self.kept = (folder / "images").exists()
        self._images = Shards(folder / "images", len(self)) if self.kept else None

    def __len__(self) -> int:
        return len(self.index.prompt)

    def __getitem__(self, index: int) -> Arrays:
        return {**self.tokens(index), "images": self.images(index)}

    def tokens(self, index: int) -> Arrays:
        """All of an encoded record but its pictures."""
        return _restored(self._tokens[index])

    def images(self, index: int) -> Arrays:
        """The pictures of an encoded record, leaves [M, ...]."""
        if self._images is not None:
            return _restored(self._images[index])
        return self.encoder(self.source[index])["images"]


def _restored(content: bytes) -> Arrays:
    found = msgpack_restore(content)
    assert isinstance(found, dict)  # as it was written
    return found


def open_encoded(
    source: Source,
    encoder: Encoder,
    folder: Path | None = None,
    *,
    shown: Shown = lambda title, total: nullcontext(_silent),
) -> Encoded:
    """Encoded records; whoever asks first reads, checks and encodes them all, a second process waits for that.

    Args:
        source: the records.
        encoder: encodes them.
        folder: the cache; None: `cache_folder`.
        shown: a bar of that title and total, to which the number of records read is told, where they are.

    Returns:
        The records.

    Raises:
        AntgmmError: bad records, all named; a full disk.
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
    """Where encoded data is kept, beside compiled programs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "antgmm-jax" / "data"


def _evict(folder: Path) -> None:
    """Makes room in the cache. What another process reads, it goes on reading: its files are open."""
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
        found = _encode(source, encoder, partial, progress)
        np.savez(partial / "index.npz", **found)
        folders.publish(partial, place)
    except AntgmmError as error:
        raise AntgmmError(_of(source, str(error))) from error
    except OSError as error:
        raise AntgmmError(f"cannot write {place}: {error.strerror or error}; free space and start again") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _of(source: Source, reason: str) -> str:
    return reason if source.path is None or reason.startswith(str(source.path)) else f"{source.path}: {reason}"


class _Pictures:
    """Writes encoded pictures for as long as all of them are likely to fit."""

    def __init__(self, folder: Path, source: Source):
        free = shutil.disk_usage(folder).free // 2
        self._folder, self._rows, self._bytes = folder, len(source), 0
        self._most = free if source.drawn else min(MOST_BYTES, free)
        self._writer: Writer | None = Writer(folder, 0)

    def add(self, row: int, record: bytes) -> None:
        self._bytes += len(record)
        expected = self._bytes * self._rows / (row + 1) if row >= _SAMPLED else 0
        if self._writer is not None and max(expected, self._bytes) > self._most:
            self._writer.flush()
            self._writer = None
            shutil.rmtree(self._folder)
        if self._writer is not None:
            self._writer.add(row, record)

    def finish(self) -> None:
        if self._writer is not None:
            self._writer.flush()


def _encode(source: Source, encoder: Encoder, folder: Path, progress: Progress) -> dict[str, Any]:
    """Writes all records, and gives their index."""
    tokens, pictures = Writer(folder / "tokens", 0, _GROUP), _Pictures(folder / "images", source)
    digest, names, texts = hashlib.sha256(), {}, False
    named: list[tuple[str, str]] = []
    long: list[tuple[str, Long]] = []
    columns = {name: np.zeros(len(source), np.int32) for name in Index._fields[:4]}
    for row, (record, made) in every(source, lambda record: (_light(record), encoder(record)), progress):
        label = record.id or f"record {row + 1}"
        texts |= bool(record.text)
        named += [(label, part) for part in encoder.names_pictures(record)]
        long += [(label, part) for part in encoder.too_long(made)]
        slots = next((len(leaf) for leaf in made["images"].values()), 0)
        kind = names.setdefault(record.type, len(names))
        for name, value in zip(columns, (len(made["prompt"]), len(made["answer"]), slots, kind), strict=True):
            columns[name][row] = value
        if named or long:
            continue
        images = msgpack_serialize(made.pop("images"))
        for content in (rest := msgpack_serialize(made), images):
            digest.update(content)
        tokens.add(row, rest)
        pictures.add(row, images)
    encoder.check_text(texts)
    refuse(named, long, len(source), encoder.picture)
    tokens.flush()
    pictures.finish()
    places = {f"places/{name}": value for name, value in source.places().items()}
    return {**columns, **places, "names": np.array([*names]), "fingerprint": np.array(digest.hexdigest()[:16])}


def _light(record: Record) -> Record:
    """A record without its pictures, which would be held while it waits."""
    return Record(**{**vars(record), "images": (), "cells": None})
