"""Object stores: `gs://`, `s3://` and other URLs of fsspec. Files are copied from a store to a folder and back."""

import errno
import hashlib
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import fsspec
from filelock import FileLock
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import known_implementations

from antgmm_jax.errors import AntgmmError
from antgmm_jax.extras import install
from antgmm_jax.io.books import read_book, write_book
from antgmm_jax.io.folders import new_file

# pathlib merges the two slashes. A drive of Windows has one letter.
_URL = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]+):/+(?P<rest>.+)")
_STAMPS = ".stamps.json"
_OF_OUR_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


class Store(NamedTuple):
    """A folder of an object store.

    Attributes:
        url: its URL, for messages.
        system: file system.
        root: path in the file system.
    """

    url: str
    system: fsspec.AbstractFileSystem
    root: str

    def files(self) -> dict[str, str]:
        """Lists the files below the folder.

        Returns:
            Relative path -> stamp, which changes with the file.

        Raises:
            AntgmmError: the store cannot be read.
        """
        with _errors(self.url, "read"):
            self.system.invalidate_cache()
            details = dict(self.system.find(self.root, detail=True))
            return {name.removeprefix(self.root).lstrip("/"): _stamp(about) for name, about in details.items()}

    def read_text(self, name: str) -> str:
        """Returns the text of a file. Raises AntgmmError if it cannot be read."""
        with _errors(f"{self.url}/{name}", "read"):
            text = self.system.read_text(self._at(name), encoding="utf-8")
            assert isinstance(text, str)
            return text

    def get(self, names: Sequence[str], folder: Path) -> None:
        """Copies files of the store to a folder; each is complete or absent.

        Args:
            names: relative paths.
            folder: local folder.

        Raises:
            AntgmmError: a file cannot be read or written, or its name leads out of the folder; then none is copied.
        """
        if outside := [name for name in names if _leaves(name)]:
            raise AntgmmError(f"{self.url}/{outside[0]} would be written outside of {folder}: rename it in the store")
        for name in names:
            with new_file(folder / name) as partial, _errors(f"{self.url}/{name}", "read"):
                self.system.get_file(self._at(name), str(partial))

    def put(self, folder: Path, names: Sequence[str]) -> None:
        """Copies files of a folder to the store, in the given order; each is complete or absent.

        Args:
            folder: local folder.
            names: relative paths.

        Raises:
            AntgmmError: a file cannot be written.
            FileNotFoundError: a local file does not exist any more.
        """
        for name in names:
            (folder / name).stat()
            if isinstance(self.system, LocalFileSystem):  # its `put_file` leaves a part of a file on a full disk
                with new_file(Path(self._at(name))) as partial:
                    shutil.copyfile(folder / name, partial)
                continue
            with _errors(f"{self.url}/{name}", "write"):
                self.system.makedirs(str(PurePosixPath(self._at(name)).parent), exist_ok=True)
                self.system.put_file(str(folder / name), self._at(name))

    def remove(self, names: Sequence[str]) -> None:
        """Removes files in the given order.

        Args:
            names: relative paths.

        Raises:
            AntgmmError: a file cannot be removed.
        """
        for name in names:
            with _errors(f"{self.url}/{name}", "write"):
                self.system.rm_file(self._at(name))

    def _at(self, name: str) -> str:
        return f"{self.root}/{name}"


def is_url(path: str | os.PathLike) -> bool:
    """Whether a path is the URL of an object store; a `pathlib.Path` of one counts too."""
    return _URL.fullmatch(os.fspath(path)) is not None


def opened(url: str | os.PathLike) -> Store:
    """Opens a folder of an object store, without connecting to it.

    Args:
        url: for example `gs://bucket/folder`.

    Raises:
        AntgmmError: it is not a URL, or the package for its scheme is not installed.
    """
    match = _URL.fullmatch(os.fspath(url).rstrip("/"))
    if match is None:
        raise AntgmmError(f"{url} is not the URL of a store: write it as gs://BUCKET/FOLDER or s3://BUCKET/FOLDER")
    scheme, rest = match["scheme"], match["rest"]
    text = f"{scheme}://{'/' * (scheme == 'file')}{rest}"
    try:
        system, root = fsspec.url_to_fs(text)
    except ImportError as error:
        reason = known_implementations.get(scheme, {}).get("err", str(error))
        raise AntgmmError(f"{text}: {reason} ({_remedy(scheme)})") from error
    except ValueError as error:
        raise AntgmmError(f"{text}: {error}: use gs://, s3:// or another scheme of fsspec") from error
    return Store(text, system, root)


def local(
    url: str | os.PathLike, patterns: Sequence[str], beside: Sequence[str] = (), skipped: Sequence[str] = ()
) -> Path:
    """Copies the files of a store into a cache, unless their copies are current, and returns the local path.

    Copies of files that the store has removed are removed too: an old index or shard would be read with the new ones.

    Args:
        url: a folder, a file, or a pattern of files such as gs://bucket/train-*.parquet.
        patterns: patterns of the files to copy from a folder.
        beside: patterns of the files to copy with a single file, from its folder.
        skipped: patterns of files that are not copied.

    Returns:
        Path of the folder, file or pattern in the cache.

    Raises:
        AntgmmError: as in `opened`, or the files do not exist or cannot be read.
    """
    path = PurePosixPath(os.fspath(url))
    single = "*" in path.name or _chosen(path.name, patterns)
    store, chosen = (opened(path.parent), (path.name, *beside)) if single else (opened(path), patterns)
    place = _cache() / hashlib.sha256(store.url.encode()).hexdigest()[:16]
    place.mkdir(parents=True, exist_ok=True)
    with FileLock(place.with_suffix(".lock")):
        files = store.files()
        stamps = {name: files[name] for name in _wanted(files, chosen, skipped)}
        if not stamps or (single and not any(_chosen(name, chosen[:1]) for name in stamps)):
            raise AntgmmError(f"{url}: there is no such file or folder: check the name and your permissions")
        record = place / _STAMPS
        before = _stamps(record)
        store.get([n for n, stamp in stamps.items() if before.get(n) != stamp or not (place / n).exists()], place)
        gone = [name for name in _wanted(before, chosen, skipped) if name not in stamps]
        for name in gone:
            if not _leaves(name):
                (place / name).unlink(missing_ok=True)
        write_book(record, {name: stamp for name, stamp in before.items() if name not in gone} | stamps)
    return place / path.name if single else place


def _stamps(record: Path) -> dict[str, str]:
    """Stamps of the files that were copied; none if their record is damaged, so that they are copied again."""
    try:
        return read_book(record)
    except AntgmmError:
        return {}


def _wanted(names: Iterable[str], chosen: Sequence[str], skipped: Sequence[str]) -> list[str]:
    """The files that match a chosen pattern and no skipped one."""
    return [name for name in names if _chosen(name, chosen) and not _chosen(name, skipped)]


def _leaves(name: str) -> bool:
    """Whether a name leads out of its folder, as in a record that was altered or a store of strangers."""
    return PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts


def _chosen(name: str, patterns: Sequence[str]) -> bool:
    """Whether a file of a folder matches a pattern; `*` matches slashes too."""
    return any(fnmatch(name, pattern) for pattern in patterns)


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "antgmm-jax" / "stores"


def _stamp(about: dict[str, Any]) -> str:
    """Size and version of a file: names of the version differ between stores."""
    names = ("ETag", "etag", "md5Hash", "crc32c", "generation", "mtime", "LastModified", "created")
    return " ".join([str(about.get("size")), *(str(about[name]) for name in names if name in about)])


def _remedy(scheme: str) -> str:
    return install("stores") if scheme in ("gs", "gcs", "s3") else f"pip install 'fsspec[{scheme}]'"


@contextmanager
def _errors(url: str, verb: str) -> Iterator[None]:
    """Reports an error of a store in one line."""
    try:
        yield
    except Exception as error:  # each implementation has its own
        if verb == "read" and isinstance(error, OSError) and error.errno in _OF_OUR_DISK:
            raise  # the caller knows which file it was writing
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise AntgmmError(
            f"cannot {verb} {url} ({reason}): check the name, the network and your permissions"
        ) from error
