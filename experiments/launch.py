"""Several processes of one run on this machine, each on its own cores: what a CPU without accelerators is best used by.

XLA gives the matrix products of a small model to one thread; processes of one core each, with a part of every batch,
run at full speed side by side.
"""

import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

from antgmm_jax.errors import AntgmmError

COMMAND = (sys.executable, "-m", "experiments.cli")
GRACE = 30
"""Seconds that a process has for ending by itself after another one has."""


@contextmanager
def others_started(processes: int) -> Iterator[str]:
    """Starts this command's other processes and keeps this one, the first, to its share of the cores.

    Args:
        processes: how many there are, this one included.

    Yields:
        HOST:PORT that they meet at.

    Raises:
        AntgmmError: more processes than cores that this one may run on.
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    if processes > len(cores):
        raise AntgmmError(f"--processes {processes}: there are {len(cores)} cores, each process takes one at least")
    shares = [cores[process::processes] for process in range(processes)]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    done = threading.Event()
    with tempfile.TemporaryFile() as told:
        started = [_start(process, address, shares[process], told) for process in range(1, processes)]
        for other in started:
            threading.Thread(target=_watch, args=(other, done, told), daemon=True).start()
        _keep_to(shares[0])
        try:
            yield address
        finally:
            done.set()
            for other in started:
                _end(other)


def _start(process: int, address: str, cores: list[int], told: IO[bytes]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [*COMMAND, *sys.argv[1:], "--coordinator", address, "--process", str(process)],
        stdin=subprocess.DEVNULL,
        stdout=told,
        stderr=told,
        preexec_fn=lambda: _keep_to(cores),
    )


def _keep_to(cores: list[int]) -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)


def _watch(other: subprocess.Popen[bytes], done: threading.Event, told: IO[bytes]) -> None:
    """Ends this process when another one has failed: JAX would wait for it for minutes."""
    if other.wait() and not done.wait(GRACE):
        told.seek(0)
        lines = told.read().decode(errors="replace").splitlines()
        last = lines[-1] if lines else "it said nothing"
        print(f"error: another process of the run has failed ({last}); the same command goes on", file=sys.stderr)
        os._exit(2)


def _end(other: subprocess.Popen[bytes]) -> None:
    try:
        other.wait(GRACE)
    except subprocess.TimeoutExpired:
        other.kill()
