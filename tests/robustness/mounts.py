"""A small disk that the kernel fills or makes read-only; mounting it needs root on Linux."""

import contextlib
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

FULL, READ_ONLY = "full", "read-only"
REASON = {FULL: "No space left on device", READ_ONLY: "Read-only file system"}


class Disk:
    """A file system of 16 MB in memory, mounted at `path`.

    Args:
        path: existing folder.

    Raises:
        PermissionError: this process may not mount.
    """

    def __init__(self, path: Path):
        self.path, self._ballast, self._covered = path, path / ".ballast", False
        try:
            _mount("-t", "tmpfs", "-o", "size=16m", "tmpfs", path)
        except (OSError, subprocess.CalledProcessError) as error:
            raise PermissionError("mounting a file system needs root") from error

    def fail(self, kind: str) -> None:
        """Fills the disk, or makes it read-only for every file that is opened from now on."""
        if kind == READ_ONLY:
            # The file system cannot be remounted while a file is open for writing, such as the lock of a run.
            _mount("--bind", self.path, self.path)
            _mount("-o", "remount,bind,ro", self.path)
            self._covered = True
            return
        with contextlib.suppress(OSError), self._ballast.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    def repair(self) -> None:
        """Frees the disk, or makes it writable again."""
        if self._covered:
            self._covered = False
            subprocess.run(["umount", "-l", self.path], check=True)
        self._ballast.unlink(missing_ok=True)

    def unmount(self) -> None:
        self.repair()
        subprocess.run(["umount", "-l", self.path], check=True)

    def failing_before(self, function: Callable[..., Any], kind: str) -> Callable[..., Any]:
        """Returns a function that makes the disk fail at its first call, and then does what `function` does."""
        struck = []

        def call(*arguments: Any, **options: Any) -> Any:
            if not struck:
                struck.append(self.fail(kind))
            return function(*arguments, **options)

        return call

    def names(self) -> set[str]:
        """Relative paths of all files."""
        return {path.relative_to(self.path).as_posix() for path in self.path.rglob("*") if path.is_file()}


def _mount(*arguments: Any) -> None:
    subprocess.run(["mount", *arguments], check=True, capture_output=True)
