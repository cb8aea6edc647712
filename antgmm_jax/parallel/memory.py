"""Memory of a device, also where containers and job schedulers limit that of the host."""

import math
import os
from contextlib import suppress
from pathlib import Path, PurePosixPath

import jax

_GROUPS, _OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def device_memory() -> int:
    """Returns the bytes of one device that JAX may use.

    It does not depend on what is in use now, so that a resumed run gets the same batches.
    """
    device = jax.local_devices()[0]
    if limit := (device.memory_stats() or {}).get("bytes_limit"):
        return limit
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
