"""Memory of a device, also where containers and job schedulers limit that of the host."""

import math
import os
import socket
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

import jax
import numpy as np
from jax.experimental import multihost_utils

_ASSUMED: list[float] = []
"""Memory inside `assumed`."""
_GROUPS, _OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def device_memory() -> float:
    """Returns the bytes of one device that JAX may use; inside `agreed` or `assumed`, what they say.

    It does not depend on what is in use now, so that a resumed run gets the same batches.
    """
    return _ASSUMED[-1] if _ASSUMED else _own() or _of_host()


@contextmanager
def assumed(size: float) -> Iterator[None]:
    """Lets programs be traced for devices with `size` bytes of memory, which need not exist."""
    _ASSUMED.append(size)
    try:
        yield
    finally:
        _ASSUMED.pop()


@contextmanager
def agreed() -> Iterator[None]:
    """Lets all processes count with the least memory of a device, as they choose the same batches from it.

    All processes must enter it. CPU processes on one machine share its memory.
    """
    if jax.process_count() == 1:
        yield
        return
    machine, own = zlib.crc32(socket.gethostname().encode()), _own()
    mine = np.array([machine, (own or _of_host()) >> 20, own == 0], np.uint32)
    machines, sizes, shared = multihost_utils.process_allgather(mine).T
    parts = np.where(shared, (machines[:, None] == machines).sum(1), 1)
    with assumed(int((sizes // parts).min()) << 20):
        yield


def _own() -> int:
    """Bytes of memory that the first device has of its own; 0 for a CPU."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", 0)


def _of_host() -> int:
    """Bytes of host memory for each device."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(min(memory, memory_limit())) // jax.local_device_count()


def memory_limit(groups: Path = _GROUPS, own: Path = _OWN_GROUPS) -> float:
    """Returns the bytes of memory that containers and job schedulers allow this process, by control groups of Linux.

    Args:
        groups: where the groups are mounted, of version 1 or 2.
        own: file with the names of the groups of this process.

    Returns:
        Bytes; infinity without a limit.
    """
    limits = [math.inf]
    for line in own.read_text().splitlines() if own.exists() else []:
        _, controllers, name = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        mount, file = (groups / "memory", "memory.limit_in_bytes") if controllers else (groups, "memory.max")
        group = PurePosixPath(name.strip("/"))
        # A limit of a group holds for the groups inside. In a container, its own group may be the mounted one.
        for folder in (group, *group.parents):
            with suppress(OSError):
                if (text := (mount / folder / file).read_text().strip()).isdecimal():
                    limits.append(int(text))
    return min(limits)
