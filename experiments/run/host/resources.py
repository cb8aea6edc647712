"""What a piece of work takes of the machine: anonymous memory, and the disk's own speed to hold it against."""

import os
import shutil
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

_STATUS = Path("/proc/self/status")
_EVERY = 0.005  # seconds between two looks at the memory
_BLOCK = 1 << 23


def memory(field: str) -> int | None:
    """Bytes of the process by the system's own name for them; None where it does not tell (not Linux).

    Args:
        field: "VmRSS", what it holds; "VmHWM", what it held at most; "RssAnon", what it holds beyond mapped files.
    """
    if not _STATUS.exists():
        return None
    lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    return int(lines[field].split()[0]) * 1024


class PeakMemory:
    """The most anonymous memory that the process held inside a `with`, beyond what it held before."""

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
        """`before` and `beyond`, bytes; empty where the system does not tell."""
        if self._before is None or self._peak is None:
            return {}
        return {"before": self._before, "beyond": self._peak - self._before}


def forget(paths: Iterable[Path]) -> None:
    """Lets files be read from the disk again and not from memory, where the system can."""
    if not hasattr(os, "posix_fadvise"):
        return
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def seconds_to_read(paths: Iterable[Path]) -> float:
    """Seconds of a plain read from the first byte to the last, from the disk."""
    paths, block = [*paths], bytearray(_BLOCK)
    forget(paths)
    began = time.perf_counter()
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(block):
                pass
    return time.perf_counter() - began


def seconds_to_write(paths: Iterable[Path], folder: Path) -> float:
    """Seconds of a plain copy of files that were just written, until it is on the disk; the copy is removed."""
    took = 0.0
    for path in paths:
        copied = folder / f".{path.name}.copy"
        try:
            began = time.perf_counter()
            shutil.copyfile(path, copied)
            with copied.open("rb") as file:
                os.fsync(file.fileno())
            took += time.perf_counter() - began
        finally:
            copied.unlink(missing_ok=True)
    return took
