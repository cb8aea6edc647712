"""Failed saves of Orbax: every write has ended before the error is raised, and nothing is printed."""

import asyncio
import logging
import threading
from collections.abc import Coroutine, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from orbax.checkpoint._src import asyncio_utils

Result = TypeVar("Result")
LIMIT = 60.0
"""Seconds to wait for what a failed save has started; it may wait for another process, which failed too."""

_lock, _saves, _level = threading.Lock(), 0, logging.NOTSET


def run_to_the_end(work: Coroutine[Any, Any, Result]) -> Result:
    """Returns the result of a coroutine, after the tasks that it has started have ended.

    Args:
        work: the coroutine.

    Raises:
        Exception: the first error of the coroutine.
    """
    loop = asyncio.new_event_loop()
    try:
        return loop.run_until_complete(work)
    finally:
        if left := asyncio.all_tasks(loop):
            loop.run_until_complete(_ended(left))
        loop.close()


async def _ended(tasks: Iterable[asyncio.Task[Any]]) -> None:
    with suppress(TimeoutError):
        await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), LIMIT)


# Orbax 0.12.8 closes the loop at the first write that fails, and TensorStore goes on with the others: on a full disk
# each of them printed "Event loop is closed" with a traceback (60 in 26 saves), and files appeared in the folder while
# it was being removed, in 4 of these saves.
asyncio_utils._run_sync_via_new_loop = run_to_the_end


@contextmanager
def silent() -> Iterator[None]:
    """Hides the tracebacks that Orbax logs in its threads while at least one such context is open."""
    global _saves, _level
    logger = logging.getLogger("absl")
    with _lock:
        _saves += 1
        if _saves == 1:
            _level = logger.level
            logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        with _lock:
            _saves -= 1
            if not _saves:
                logger.setLevel(_level)


def wait_for_threads() -> None:
    """Waits until the threads of a failed save have ended: Orbax raises the error of the first one."""
    for thread in threading.enumerate():
        if type(thread).__module__.startswith("orbax."):
            threading.Thread.join(thread, LIMIT)  # Orbax's own `join` raises the error of the thread
