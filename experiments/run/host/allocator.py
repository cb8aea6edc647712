"""Settings of the C library's allocator: XLA on a CPU allocates its buffers again at every step."""

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# From glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
_LARGEST = 1 << 26
"""Bytes of the largest buffer that is kept. Larger ones are weights of large models: kept in the arenas of several
threads, they took 30 bytes a parameter where 20 were in use, and their page faults are a small part of a step's time.
"""
_ARENAS = 4
"""Arenas of threads where cores are fewer; elsewhere one a core. Of the eight a core that glibc takes, the hundred
threads of checkpoints leave holes in all (docs/lab/memory.md); a single one makes a step up to twice as long.
"""
_COMPILED = "/jax/core/compile/backend_compile_duration"
_LONG = 1.0
"""Seconds of a compilation that leaves much freed memory: 0.9 GB for a step of a model with 290 M parameters."""


def keep_freed_memory() -> bool:
    """Makes glibc keep freed buffers of small models in the process, in few arenas; call it before starting threads.

    Otherwise the buffers of each step are mapped and unmapped, and a fifth of its time is spent on page faults.

    Returns:
        Whether the C library accepted the settings.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    arenas = max(_ARENAS, os.cpu_count() or 1)
    settings = ((_MMAP_THRESHOLD, _LARGEST), (_TRIM_THRESHOLD, 2**31 - 1), (_ARENA_MAX, arenas))  # mallopt takes ints
    return mallopt is not None and all(mallopt(name, value) for name, value in settings)


def return_freed_memory() -> None:
    """Returns freed memory that glibc keeps to the system; call it where a model was dropped."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


@contextmanager
def returning_memory_of_compilers() -> Iterator[None]:
    """A context in which memory that a long compilation has freed is returned before the program runs."""
    import jax.monitoring as monitoring  # the command line starts without JAX

    def compiled(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == _COMPILED and duration_secs > _LONG:
            return_freed_memory()

    monitoring.register_event_duration_secs_listener(compiled)
    try:
        yield
    finally:
        monitoring.unregister_event_duration_listener(compiled)
