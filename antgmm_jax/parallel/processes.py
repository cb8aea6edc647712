"""Several processes that make one run (`jax.distributed`): all compute, the first one writes."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from antgmm_jax.errors import AntgmmError
from antgmm_jax.parallel.sharding import alone

Found = TypeVar("Found")
_LONGEST = 4096  # bytes of an error that is told to the others


def first() -> bool:
    """Whether this process is the one that writes."""
    return jax.process_index() == 0


def wait(moment: str) -> None:
    """Until all processes are here.

    Args:
        moment: its name, the same in all of them.
    """
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(moment)


def gather(tree: Any) -> Any:
    """Arrays whole in the memory of every process; all of them call it.

    Args:
        tree: arrays, on the devices of all processes or on the host.

    Returns:
        The tree as numpy arrays.
    """

    def whole(leaf: Any) -> np.ndarray:
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
            return np.asarray(leaf)
        return multihost_utils.process_allgather(leaf, tiled=True)

    return jax.tree.map(whole, tree)


def from_first(tree: Any) -> Any:
    """The first process's numpy arrays, in every process; the others give arrays of the same shapes."""
    return jax.tree.map(np.array, multihost_utils.broadcast_one_to_all(tree))  # copies, for JAX gives read-only ones


def by_first(work: Callable[[], Found]) -> Found | None:
    """Lets the first process do something by itself, outside of the mesh, while the others wait.

    Args:
        work: what only one may do, such as writing a file. It must not wait for the other processes.

    Returns:
        What it gave in the first process, None in the others.

    Raises:
        AntgmmError: what it refused, in every process.
    """
    found, refused = None, ""
    if first():
        try:
            with alone():
                found = work()
        except AntgmmError as error:
            if jax.process_count() == 1:
                raise
            refused = str(error)
    if jax.process_count() > 1:
        padded = refused.encode()[:_LONGEST].ljust(_LONGEST, b"\0")
        told = from_first(np.frombuffer(padded, np.uint8)).tobytes().rstrip(b"\0")
        if told:
            raise AntgmmError(told.decode(errors="ignore"))
    return found
