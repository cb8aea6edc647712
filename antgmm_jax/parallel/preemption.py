"""Preemption: after SIGTERM, a run saves and ends at its next safe point, in all processes at the same one.

A safe point is a place in the code where nothing is lost: `leave` between the batches of a loop, `requested` in a
training loop that saves first. A second SIGTERM ends the process at once.
"""

import ctypes
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

Item = TypeVar("Item")

EXIT_CODE = 128 + signal.SIGTERM
"""Exit code of a process that SIGTERM has ended, as in shells."""


class Preempted(Exception):
    """The run was ended at a safe point; the same command continues it."""


class _Notice:
    """SIGTERM of this process, and the agreement of all processes on a safe point."""

    def __init__(self) -> None:
        self.received, self.distributed = threading.Event(), False
        self._points, self._agreed = 0, False

    def agreed(self) -> bool:
        """Whether all processes leave at this safe point; every process calls it equally often."""
        if not self.distributed:
            return self.received.is_set()
        if not self._agreed:
            from jax.experimental import multihost_utils

            # It sends nothing to the others until one of them gets the signal.
            self._agreed, self._points = multihost_utils.reached_preemption_sync_point(self._points), self._points + 1
        return self._agreed


_notice = _Notice()


def requested() -> bool:
    """Whether to save and leave now; all processes of a run must call it equally often, and get the same answer."""
    return _notice.agreed()


def leave() -> None:
    """A safe point that all processes reach.

    Raises:
        Preempted: SIGTERM was received by one of the processes.
    """
    if requested():
        raise Preempted


def leave_alone() -> None:
    """A safe point that only this process reaches; it counts only if there are no other processes.

    Raises:
        Preempted: SIGTERM was received.
    """
    if not _notice.distributed:
        leave()


def leaving(items: Iterable[Item]) -> Iterator[Item]:
    """Iterates with a safe point, as in `leave`, before each item.

    Args:
        items: for example batches.

    Yields:
        The items.

    Raises:
        Preempted: as in `leave`.
    """
    for item in items:
        leave()
        yield item


@contextmanager
def watched(announce: Callable[[str], None], *, distributed: bool = False) -> Iterator[None]:
    """Receives SIGTERM inside the context; without it, the signal ends the process.

    Does nothing outside the main thread, where Python cannot receive signals.

    Args:
        announce: prints a message; called in a thread.
        distributed: whether `jax.distributed` runs with its preemption service, which then learns of the signal.
    """
    global _notice
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before, _notice = _notice, _Notice()
    _notice.distributed = distributed
    service = _take_over() if distributed else lambda number: None
    # A Python handler waits until the main thread leaves XLA, which may compile for minutes. The pipe does not wait.
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    handler = signal.signal(signal.SIGTERM, lambda *_: None)
    wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    listener = threading.Thread(target=_listen, args=(reader, _notice.received, announce, service), daemon=True)
    listener.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        signal.signal(signal.SIGTERM, handler or signal.SIG_DFL)
        os.close(writer)
        listener.join()
        os.close(reader)
        _notice = before


def _listen(
    reader: int, received: threading.Event, announce: Callable[[str], None], service: Callable[[int], None]
) -> None:
    while number := os.read(reader, 1):
        if number[0] != signal.SIGTERM:
            continue
        if received.is_set():
            os._exit(EXIT_CODE)
        received.set()
        service(signal.SIGTERM)
        announce("SIGTERM: saving at the next safe point; a second SIGTERM ends the run at once")


def _take_over() -> Callable[[int], None]:
    """Removes the handler of JAX's preemption service, which ignores a second SIGTERM, and returns it."""
    set_handler = ctypes.CDLL(None).signal
    set_handler.restype, set_handler.argtypes = ctypes.c_void_p, (ctypes.c_int, ctypes.c_void_p)
    handler = set_handler(signal.SIGTERM, None)
    return ctypes.CFUNCTYPE(None, ctypes.c_int)(handler) if handler else lambda number: None
