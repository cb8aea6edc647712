"""Freed memory stays with the process, up to a size: repeated allocations cause no page faults."""

import os
import subprocess
import sys

import jax
import pytest

from experiments.run.host import allocator

FAULTS = """
import ctypes, resource
from experiments.run.host.allocator import keep_freed_memory
{call}
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
def touch():
    block = libc.malloc({size})
    ctypes.memset(block, 1, {size})
    libc.free(block)
touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    touch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(call, size=2**25):
    done = subprocess.run(
        [sys.executable, "-c", FAULTS.format(call=call, size=size)], capture_output=True, text=True, check=True
    )
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="a setting of glibc")
def test_reallocated_buffers_cause_no_page_faults():
    assert faults("assert keep_freed_memory()") < 100 < faults("")


ARENAS = """
import ctypes, sys, threading
from experiments.run.host.allocator import keep_freed_memory
{call}
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.fdopen.restype = ctypes.c_void_p, ctypes.c_void_p
libc.fdopen.argtypes, libc.malloc_info.argtypes = [ctypes.c_int, ctypes.c_char_p], [ctypes.c_int, ctypes.c_void_p]
libc.fflush.argtypes = [ctypes.c_void_p]
meet = threading.Barrier({threads} + 1)
def allocate():
    libc.malloc(100)
    meet.wait()  # so that all of them are there at once
    meet.wait()
for _ in range({threads}):
    threading.Thread(target=allocate, daemon=True).start()
meet.wait()
output = libc.fdopen(1, b"w")
libc.malloc_info(0, output)
libc.fflush(output)
meet.wait()
"""


def arenas(call, threads):
    """Number of arenas of some threads that allocate, by glibc."""
    code = ARENAS.format(call=call, threads=threads)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.count("<heap nr=")


@pytest.mark.skipif(sys.platform != "linux", reason="a setting of glibc")
def test_threads_share_few_arenas():
    most = max(4, os.cpu_count())
    assert arenas("assert keep_freed_memory()", 2 * most) <= most < arenas("", 2 * most)


RETURNED = """
import ctypes
from experiments.run.host import allocator, resources
allocator.keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
blocks = [libc.malloc(2**25) for _ in range(8)]
for block in blocks:
    ctypes.memset(block, 1, 2**25)
for block in blocks:
    libc.free(block)
kept = resources.memory("VmRSS")
allocator.return_freed_memory()
print(kept - resources.memory("VmRSS"))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a function of glibc")
def test_freed_memory_is_returned_on_demand():
    done = subprocess.run([sys.executable, "-c", RETURNED], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 7 * 2**25


@pytest.mark.skipif(sys.platform != "linux", reason="a setting of glibc")
def test_buffers_of_large_models_are_returned():
    assert faults("assert keep_freed_memory()", size=2**27) > 100


@pytest.mark.skipif(sys.platform != "linux", reason="a function of glibc")
def test_memory_of_a_long_compilation_is_returned_and_that_of_a_short_one_kept(monkeypatch):
    returned = []
    monkeypatch.setattr(allocator, "return_freed_memory", lambda: returned.append(True))
    with allocator.returning_memory_of_compilers():
        jax.jit(lambda x: x + 1)(1.0)
        assert not returned
        monkeypatch.setattr(allocator, "_LONG", 0.0)
        jax.jit(lambda x: x + 2)(1.0)
        assert returned
    before = len(returned)
    jax.jit(lambda x: x + 3)(1.0)
    assert len(returned) == before
