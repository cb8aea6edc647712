"""Settings of the C library's allocator: XLA on a CPU allocates its buffers again at every step."""

import ctypes
import sys

# From glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST = 2**31 - 1  # mallopt takes an int


def keep_freed_memory() -> bool:
    """Makes glibc keep freed memory in the process; call it before starting threads.

    Otherwise the buffers of each step are mapped and unmapped, and a fifth of its time is spent on page faults.

    Returns:
        Whether the C library accepted the setting.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    # Threads keep separate arenas: a single arena makes a step up to twice as long.
    settings = ((_MMAP_THRESHOLD, _LARGEST), (_TRIM_THRESHOLD, _LARGEST))
    return mallopt is not None and all(mallopt(name, value) for name, value in settings)
