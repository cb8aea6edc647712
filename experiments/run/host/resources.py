"""Measurement of memory and of the speed of the disk."""

import os
import shutil
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

_STATUS = Path("/proc/self/status")
_EVERY = 0.005  # seconds between memory readings
_BLOCK = 1 << 23


def memory(field: str) -> int | None:
    """Returns the memory of this process in bytes; None except on Linux.

    Args:
        field: "VmRSS" (current), "VmHWM" (peak) or "RssAnon" (current, without mapped files).
    """
    if not _STATUS.exists():
        return None
    lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    return int(lines[field].split()[0]) * 1024


class PeakMemory:
    """Measures the peak of anonymous memory inside a `with` block, relative to its start."""

    def __enter__(self) -> Self:
        self._before = self._peak = memory("RssAnon")
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while (now := memory("RssAnon")) is not None and self._peak is not None:
            self._peak = max(self._peak, now)
            if self._done.wait(_EVERY):
                return

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    @property
    def figures(self) -> dict[str, Any]:
        """Bytes `before` the block and peak increase `beyond` it; empty except on Linux."""
        if self._before is None or self._peak is None:
            return {}
        return {"before": self._before, "beyond": self._peak - self._before}


def forget(paths: Iterable[Path]) -> None:
    """Removes files from the page cache, if the system supports it."""
    if not hasattr(os, "posix_fadvise"):
        return
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def seconds_to_read(paths: Iterable[Path]) -> float:
    """Measures the seconds to read files from the disk."""
    paths, block = [*paths], bytearray(_BLOCK)
    forget(paths)
    start = time.perf_counter()
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(block):
                pass
    return time.perf_counter() - start


def seconds_to_write(paths: Iterable[Path], folder: Path) -> float:
    """Measures the seconds to copy files in the page cache to the disk; the copies are removed."""
    seconds = 0.0
    for path in paths:
        copied = folder / f".{path.name}.copy"
        try:
            start = time.perf_counter()
            shutil.copyfile(path, copied)
            with copied.open("rb") as file:
                os.fsync(file.fileno())
            seconds += time.perf_counter() - start
        finally:
            copied.unlink(missing_ok=True)
    return seconds
