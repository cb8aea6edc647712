"""Files and folders that are complete or absent: written under a hidden name, flushed to disk, renamed."""

import contextlib
import glob
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from antgmm_jax.errors import AntgmmError

_BLOCK = 1 << 22
_UMASK = os.umask(0o77)
os.umask(_UMASK)


class Unwritten(AntgmmError):
    """A file or folder that could not be written, for example because the disk is full."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Reports a path that cannot be written.

    Args:
        path: the file that is being written.

    Raises:
        Unwritten: an error of the disk.
    """
    try:
        yield
    except OSError as error:
        raise Unwritten(
            f"cannot write {path}: {error.strerror or error}; free disk space or choose another folder"
        ) from error


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Writes a file atomically: yields a hidden temporary path, which is flushed and renamed to `path` at the end.

    Args:
        path: the new file; its folder is created. It does not exist after an error.

    Yields:
        The path to write to.

    Raises:
        Unwritten: the file cannot be written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            partial.chmod(0o666 & ~_UMASK)  # some libraries write for their owner alone
            os.replace(partial, path)
            _flush_names(path.parent)
    finally:
        with contextlib.suppress(OSError):  # must not hide the first error
            partial.unlink()


@contextmanager
def claimed(path: Path) -> Iterator[None]:
    """Keeps other processes from writing a file or folder at the same time.

    Args:
        path: the file or folder. Beside it, a hidden lock file exists meanwhile; their folder is created.

    Raises:
        AntgmmError: another process is writing it, or it is a link to nothing.
        Unwritten: its folder cannot be written.
    """
    if path.is_symlink() and not path.exists():
        raise AntgmmError(f"{path} is a link to nothing: choose another name or remove it")
    lock = FileLock(path.with_name(f".{path.name}.lock"), timeout=0)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout:
            reason = "is being written by another process: wait for it or choose another name"
            raise AntgmmError(f"{path} {reason}") from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # must not hide the first error
            os.unlink(lock.lock_file)  # while it is held: a process that waits for it then opens a new one
        lock.release()


@contextmanager
def new_folder(directory: Path) -> Iterator[Path]:
    """Writes a folder atomically: yields a hidden temporary folder, which becomes `directory` at the end.

    Args:
        directory: the new folder; its parent is created. It does not exist after an error.

    Yields:
        The folder to write to.

    Raises:
        AntgmmError: the folder exists, or another process is writing it.
        Unwritten: the folder cannot be written.
    """
    try:
        with claimed(directory), temporary_folder(directory) as temporary:
            if directory.exists():
                raise AntgmmError(f"{directory} exists: choose another name or remove it")
            yield temporary
            temporary.chmod(0o777 & ~_UMASK)
            publish(temporary, directory)
    except OSError as error:
        raise Unwritten(
            f"{directory} could not be written ({error}): free disk space or choose another place"
        ) from error


@contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """Yields a hidden temporary folder beside a path, and removes it at the end.

    Args:
        path: what will be written. Temporary folders for it that a killed process has left are removed.

    Yields:
        The folder.
    """
    for left in path.parent.glob(f".{glob.escape(path.name)}-*.tmp"):
        shutil.rmtree(left, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}-", suffix=".tmp", dir=path.parent))
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # on a disk that is read-only now, the next call removes it


def publish(temporary: Path, target: Path) -> None:
    """Flushes every file of `temporary` to disk and renames it to `target`, which must not exist.

    Without the flush, a power failure after the rename could leave incomplete files.
    """
    _flush(temporary)
    temporary.rename(target)
    _flush_names(target.parent)


def replace(fresh: Path, target: Path) -> None:
    """Flushes the files of a finished folder to disk, replaces a folder by it, and then removes the old one."""
    _flush(fresh)
    if target.exists():
        _set_aside(target)
    fresh.rename(target)
    _flush_names(target.parent)
    shutil.rmtree(_old(target), ignore_errors=True)


def discard(path: Path) -> None:
    """Removes a folder, after renaming it, so that a partly removed folder never has its name.

    On a network file system, files that are being read stay under the hidden name until `remove_leftovers`.
    """
    _set_aside(path)
    shutil.rmtree(_old(path), ignore_errors=True)


def remove_leftovers(directory: Path) -> None:
    """Removes hidden files and folders (`.NAME.tmp`, `.NAME.old`) in `directory` that a killed process has left."""
    for path in [*directory.glob(".*.tmp"), *directory.glob(".*.old")]:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def checksums(directory: Path) -> dict[str, tuple[int, int]]:
    """Returns relative path -> (size in bytes, CRC-32) for each file in `directory`."""
    return {path.relative_to(directory).as_posix(): (path.stat().st_size, _crc32(path)) for path in _files(directory)}


def verify(directory: Path, expected: Mapping[str, Sequence[int]]) -> None:
    """Raises AntgmmError for the first file that differs from its entry in `expected`, a result of `checksums`."""
    for name, (size, checksum) in expected.items():
        path = directory / name
        actual = path.stat().st_size if path.is_file() else 0
        if actual != size:
            raise AntgmmError(f"{path} is truncated ({actual} of {size} bytes); remove {directory} and run it again")
        if _crc32(path) != checksum:
            raise AntgmmError(f"{path} was altered after it was saved; remove {directory} and run it again")


def _old(path: Path) -> Path:
    """Returns the hidden name of a folder that is about to be removed."""
    return path.with_name(f".{path.name}.old")


def _set_aside(path: Path) -> None:
    shutil.rmtree(_old(path), ignore_errors=True)
    path.rename(_old(path))


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def _crc32(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            checksum = zlib.crc32(block, checksum)
    return checksum


def _flush(directory: Path) -> None:
    for path in _files(directory):
        with path.open("rb") as file:
            os.fsync(file.fileno())
    for folder in [*(path for path in directory.rglob("*") if path.is_dir()), directory]:
        _flush_names(folder)


def _flush_names(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
