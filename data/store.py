"""Cache of encoded records: each record is read, checked and encoded only once.

A folder of the cache contains a data set encoded by one processor: `index.npz` with small arrays, and ArrayRecord files
with token ids and, if they fit, images. It is written under a hidden name and renamed.
"""

import fcntl
import hashlib
import os
import time
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout
from flax.serialization import msgpack_restore

from antgmm_jax.io import folders
from antgmm_jax.io.shards import Shards
from data.building import Progress, build, silent
from data.encoding import Encoder, versions
from data.index import COLUMNS, Index, read_arrays
from data.kept import cache_folder
from data.record import Arrays
from data.source import Source

Shown = Callable[[str, int], AbstractContextManager[Progress]]


def unshown(title: str, total: int) -> AbstractContextManager[Progress]:
    """Shows no progress bar."""
    return nullcontext(silent)


MOST_BYTES = 4 << 30
"""Maximum size of the encoded images of a data set; images of larger data are decoded from their files every epoch."""
CACHE_BYTES = 16 << 30
"""Maximum size of the cache; the least recently used data sets are removed."""
THREADS = min(8, os.cpu_count() or 1)


class Encoded:
    """Encoded records by index.

    Args:
        source: records.
        encoder: encoder of the records.
        folder: complete folder of the cache.
        use: what keeps the folder from being removed.

    Attributes:
        source: records.
        encoder: encoder of the records.
        index: sizes and types of the records.
        kept: whether encoded images are in the cache, or else are decoded from their files.
        dropped: number of records of the source that were too long and are left out.
    """

    def __init__(self, source: Source, encoder: Encoder, folder: Path, use: BinaryIO | None = None):
        self.source, self.encoder = source, encoder
        if use is not None:
            weakref.finalize(self, use.close)
        arrays = read_arrays(folder / "index.npz")
        source.restore({name[len("places/") :]: x for name, x in arrays.items() if name.startswith("places/")})
        names, fingerprint = tuple(arrays["names"].tolist()), str(arrays["fingerprint"])
        self.index = Index(**{n: arrays[n] for n in COLUMNS}, names=names, fingerprint=fingerprint)
        self.dropped = int(arrays["dropped"])
        self._tokens = Shards(folder / "tokens", len(self), folder)
        self.kept = (folder / "images").exists()
        self._images = Shards(folder / "images", len(self), folder) if self.kept else None

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
    shown: Shown = unshown,
) -> Encoded:
    """Opens encoded records in the cache; reads, checks and encodes all records first if they are not there.

    While one process encodes, others wait.

    Args:
        source: records.
        encoder: encoder of the records.
        folder: folder of the cache; default: `cache_folder("data")`.
        shown: creates a progress bar from a title and a total; used if records are encoded.

    Returns:
        The encoded records.

    Raises:
        AntgmmError: lists all bad records; or the disk is full.
    """
    if (prepared := source.encoded(encoder)) is not None:
        return Encoded(source, encoder, prepared)
    place = _place(source, encoder, folder)
    folder = place.parent
    with folders.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with FileLock(place.with_suffix(".lock")):
        if not place.exists():
            _evict(folder)
            with shown(f"reading {source.path or 'records'}", len(source)) as progress:
                build(source, encoder, place, progress, most=None if source.drawn else MOST_BYTES, threads=THREADS)
        os.utime(place)
        return Encoded(source, encoder, place, _use(place))


def open_if_encoded(source: Source, encoder: Encoder, folder: Path | None = None) -> Encoded | None:
    """Opens encoded records, or returns None if they are not encoded yet.

    Args:
        source: records.
        encoder: encoder of the records.
        folder: folder of the cache; default: `cache_folder("data")`.
    """
    place = source.encoded(encoder) or _place(source, encoder, folder)
    return Encoded(source, encoder, place) if place.exists() else None


def _place(source: Source, encoder: Encoder, folder: Path | None) -> Path:
    name = hashlib.sha256(f"{source.digest()} {encoder.digest()} {versions()}".encode()).hexdigest()[:32]
    return (folder or cache_folder("data")) / name


def _use(place: Path) -> BinaryIO:
    """A file with a lock that many processes may hold, until they close it.

    On a network file system, other machines cannot read on in a file that one has removed.
    """
    file = place.with_suffix(".used").open("ab+")
    fcntl.flock(file, fcntl.LOCK_SH)
    return file


def _evict(folder: Path) -> None:
    """Removes old data sets from the cache that no process has open."""
    used = {path: _used(path) for path in folder.iterdir() if path.is_dir()}
    sizes = {path: size for path, (_, size) in used.items()}
    for path in sorted(used, key=lambda path: used[path][0]):
        if sum(sizes.values()) <= CACHE_BYTES:
            break
        name = path.name.removeprefix(".").removesuffix(".tmp")
        lock, use = folder / f"{name}.lock", folder / f"{name}.used"
        try:
            with FileLock(lock, timeout=0), FileLock(use, timeout=0):
                folders.discard(path)
                for file in (use, lock):  # while they are held, so that no two processes hold different files
                    file.unlink(missing_ok=True)
        except (Timeout, OSError):  # being written or read; or another process has removed it
            continue
        sizes.pop(path)


def _used(place: Path) -> tuple[float, int]:
    """Time of the last use and bytes of a folder, from which another process may remove files meanwhile."""
    with suppress(FileNotFoundError):
        return place.stat().st_mtime, sum(file.stat().st_size for file in place.rglob("*") if file.is_file())
    return time.time(), 0
