"""Runs with several processes (`jax.distributed`): all of them compute, the first one writes files."""

import hashlib
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from antgmm_jax.errors import AntgmmError, disk_error
from antgmm_jax.parallel.sharding import without_mesh

Item = TypeVar("Item")
Result = TypeVar("Result")
_MAX_MESSAGE = 4096  # bytes of a text sent to the other processes


def is_first() -> bool:
    """Whether this is the first process, the one that writes files."""
    return jax.process_index() == 0


def barrier(moment: str) -> None:
    """Blocks until all processes have called it.

    Args:
        moment: name of the barrier, equal in all processes.
    """
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(moment)


def gather(tree: Any) -> Any:
    """Copies whole arrays to the host memory of every process; all processes must call it.

    Args:
        tree: arrays on the devices of all processes or on the host.

    Returns:
        The tree as NumPy arrays.
    """

    def whole(leaf: Any) -> np.ndarray:
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
            return np.asarray(leaf)
        return multihost_utils.process_allgather(leaf, tiled=True)

    return jax.tree.map(whole, tree)


def broadcast_from_first(tree: Any) -> Any:
    """Broadcasts the first process's NumPy arrays; the other processes pass arrays of equal shapes."""
    return jax.tree.map(np.array, multihost_utils.broadcast_one_to_all(tree))  # copies: JAX returns read-only arrays


def check_equal(what: str, text: str) -> None:
    """Checks that all processes have the same of something; all of them must call it.

    Args:
        what: what it is, for the message.
        text: a form of it that is equal if and only if it is.

    Raises:
        AntgmmError: a process has another one; every process raises it.
    """
    if jax.process_count() == 1:
        return
    digests = multihost_utils.process_allgather(np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8))
    if other := np.flatnonzero((digests != digests[0]).any(axis=1)).tolist():
        raise AntgmmError(
            f"process {other[0]} has another {what} than process 0: start all with the same command and the same files"
        )


def run_on_first(work: Callable[[], Result]) -> Result | None:
    """Calls a function in the first process only, outside the mesh, while the others wait.

    Args:
        work: function, for example one that writes a file. It must not wait for the other processes.

    Returns:
        The function's result in the first process, None in the others.

    Raises:
        AntgmmError: the function raised it, or an error of the disk; every process raises it. Other errors of the
            first process are raised there, and the others say so.
    """
    result, message, unexpected = None, "", None
    if is_first():
        try:
            with without_mesh():
                result = work()
        except _OfItems as error:
            raise error.of from error.of.__cause__  # the other processes raise it too
        except Exception as error:
            line = disk_error(error) if isinstance(error, OSError) else error
            if jax.process_count() == 1:
                raise
            # Otherwise the other processes would wait for a result until JAX gives up.
            if not isinstance(line, AntgmmError):
                unexpected, line = error, f"the first process failed: {type(error).__name__}: {error}"
            message = str(line)
    if jax.process_count() > 1:
        received = _text(message)
        if unexpected is not None:
            raise unexpected
        if received:
            raise AntgmmError(received)
    return result


def from_first_process(condition: Callable[[], bool]) -> bool:
    """Evaluates a condition in the first process, outside the mesh, and broadcasts it.

    The others do not look at files: a network file system would go on to report what they have not found.

    Args:
        condition: function such as `path.exists`.

    Raises:
        AntgmmError: as in `run_on_first`.
    """
    return bool(broadcast_from_first(np.array(bool(run_on_first(condition)))))


def text_from_first(work: Callable[[], str]) -> str:
    """Calls a function in the first process, outside the mesh, and broadcasts the text that it returns.

    Args:
        work: function; its text is at most 4096 bytes long.

    Raises:
        AntgmmError: as in `run_on_first`.
    """
    return _text(run_on_first(work) or "")


def _text(text: str) -> str:
    """The first process's text, cut to `_MAX_MESSAGE` bytes."""
    padded = text.encode(errors="replace")[:_MAX_MESSAGE].ljust(_MAX_MESSAGE, b"\0")
    return broadcast_from_first(np.frombuffer(padded, np.uint8)).tobytes().rstrip(b"\0").decode(errors="ignore")


class _OfItems(Exception):
    """An error of items that all processes compute, so that all raise it; `of` is the error."""

    def __init__(self, of: Exception):
        super().__init__(of)
        self.of = of


def run_on_first_with(items: Iterator[Item], work: Callable[[Iterator[Item]], Result]) -> Result | None:
    """Calls a function in the first process only, with items that all processes compute together, one at a time.

    Args:
        items: for example arrays that are gathered one after the other; equal in all processes.
        work: function of the items, for example one that writes them to a file.

    Returns:
        The function's result in the first process, None in the others.

    Raises:
        AntgmmError: the function raised it; every process raises it.
    """

    def watched() -> Iterator[Item]:
        try:
            yield from items
        except Exception as error:
            raise _OfItems(error) from error

    def first() -> Result:
        try:
            return work(watched() if jax.process_count() > 1 else items)
        finally:
            if jax.process_count() > 1:
                deque(items, maxlen=0)  # after an error too: the others wait for each item

    if not is_first():
        with without_mesh():
            deque(items, maxlen=0)
    return run_on_first(first)
