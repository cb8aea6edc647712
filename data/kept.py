"""Results of scans over large files, stored on disk so that an unchanged file is scanned only once."""

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from antgmm_jax.errors import AntgmmError
from antgmm_jax.io import folders
from data.index import read_arrays

FOLDER_BYTES = 1 << 30
"""Maximum size of the folder; the least recently used results are removed."""
SETTLED = 2.0
"""Seconds since its last change after which a file counts as complete: times of files have a coarse resolution."""
_FORMAT = 9
"""To be increased when the parsing of rows changes (`data.rows`, `data.chat_rows`): what is valid is stored."""
_NAMES, _COLUMN = "names", "column/"
"""Names of the array with the names of the columns, and, before theirs, of the columns: `numpy.savez` has arguments."""
Columns = dict[str, np.ndarray]


def cache_folder(name: str) -> Path:
    """Returns the folder of a cache: `data` for encoded rows, `scans` for scans of files."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "antgmm-jax" / name


def kept(about: str, files: Sequence[Path], scan: Callable[[], Columns]) -> Columns:
    """Returns the result of a scan, from disk if an earlier process did the same scan of the same files.

    Args:
        about: describes the scan and its other inputs.
        files: files that it reads. If one of them changes, the scan runs again.
        scan: returns arrays by name.

    Returns:
        Result of `scan`.
    """
    now = time.time()
    status = [(file.resolve(), file.stat()) for file in files]
    digest = hashlib.sha256(f"{_FORMAT} {about}".encode())
    for path, each in status:
        digest.update(f"\n{path} {each.st_ino} {each.st_size} {each.st_mtime_ns} {each.st_ctime_ns}".encode())
    place = cache_folder("scans") / f"{digest.hexdigest()[:32]}.npz"
    if (columns := _read(place)) is not None:
        return columns
    columns = scan()
    if all(max(each.st_mtime, each.st_ctime) < now - SETTLED for _, each in status):
        _write(place, columns)
    return columns


def _read(place: Path) -> Columns | None:
    try:
        arrays = read_arrays(place)
        columns = {name: arrays[_COLUMN + name] for name in arrays[_NAMES].tolist()}
        os.utime(place)
    except (AntgmmError, KeyError, OSError):  # absent or damaged
        return None
    return columns


def _write(place: Path, columns: Columns) -> None:
    """Writes a result, and removes old ones. A disk that is full or cannot be written costs only time."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with folders.new_file(place) as temporary, temporary.open("wb") as file:
            arrays = {_NAMES: np.array([*columns]), **{_COLUMN + name: array for name, array in columns.items()}}
            np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]
        results = sorted(place.parent.glob("*.npz"), key=lambda path: -path.stat().st_mtime)
        for path, total in zip(results, np.cumsum([path.stat().st_size for path in results]), strict=True):
            if total > FOLDER_BYTES:
                path.unlink(missing_ok=True)
    except (OSError, AntgmmError):
        return


def to_bytes(names: Iterable[str]) -> np.ndarray:
    """Returns names without duplicates, in order, as an array of bytes for `kept`."""
    return np.frombuffer("\0".join(dict.fromkeys(names)).encode("utf-8", "surrogatepass"), np.uint8)


def from_bytes(joined: np.ndarray) -> list[str]:
    """Returns the names of `to_bytes`."""
    return joined.tobytes().decode("utf-8", "surrogatepass").split("\0") if joined.size else []
