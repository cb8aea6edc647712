"""Devices and processes of a run, which are command-line options and not part of recipes."""

import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import jax

from antgmm_jax.errors import AntgmmError, OtherProcessError
from antgmm_jax.parallel import preemption, sharding
from antgmm_jax.parallel.memory import agreed
from antgmm_jax.parallel.processes import barrier, is_first
from experiments.run.host.accelerators import unused_gpu
from experiments.run.host.console import CONSOLE, say
from experiments.run.host.programs import share_programs

MOST_SIMULATED = 512
"""CPU devices of a process: a hundred thousand take gigabytes, and do not start within a minute."""
_ALL_STARTED = 1800
"""Seconds in which all processes of a run must have started."""
_SIZE = re.compile(r"\s*[0-9]{1,6}\s*")
THREADS = 4
"""Threads of XLA for each simulated device."""
AUTO = "auto"
END = "end of the command"
"""The first process may upload for longer than JAX's five minutes for the others to wait at its shutdown."""


@contextmanager
def devices(mesh: str, coordinator: str, processes: int, process: int) -> Iterator[None]:
    """Connects the processes of a run, sets its mesh in JAX, and receives SIGTERM.

    Args:
        mesh: `AXIS=N,...` with axes of `sharding.MESH`; "" for one device, or with several processes for all devices on
            the axis `data`.
        coordinator: HOST:PORT of process 0, "auto" for a Slurm or Kubernetes job, or "" for a single process.
        processes: number of processes; only used with HOST:PORT.
        process: number of this process, from 0.

    Raises:
        AntgmmError: the mesh is invalid or too large, JAX does not use the GPUs that are there, there are several
            processes without a coordinator, or a process fails.
    """
    if processes > 1 and not coordinator:
        raise AntgmmError(f"--processes {processes}: add --coordinator HOST:PORT, and start each of them")
    sizes = parse(mesh)
    if sizes:
        count = max(math.prod(sizes.values()) // processes, 1)
        if count > MOST_SIMULATED and coordinator != AUTO:  # the number of processes is known later
            raise AntgmmError(f"--mesh {mesh}: {count} devices a process, at most {MOST_SIMULATED} are supported")
        simulate(min(count, MOST_SIMULATED))
    if coordinator:
        _join(coordinator, processes, process)
        CONSOLE.quiet = not is_first()
    if unused_gpu():
        why = "JAX does not use the GPU of this machine: pip install 'jax[cuda13]', or see what its log says of CUDA"
        if sizes:  # else simulated devices would train what the GPUs are there for
            raise AntgmmError(f"--mesh {mesh}: {why}; JAX_PLATFORMS=cpu simulates devices")
        say(f"warning: {why}")
    if sizes and jax.default_backend() == "cpu" and jax.local_device_count() > 1:
        say(f"note: --mesh {mesh} has simulated devices: times and memory are those of this CPU")
    with preemption.watched(say, distributed=bool(coordinator)), _on_mesh(sizes):
        if coordinator:
            # The first collective connects the GPUs, with a limit of minutes: before the first process copies files.
            share_programs()
        with agreed():
            try:
                yield
            except preemption.Preempted:
                barrier(END)
                raise
            barrier(END)


@contextmanager
def _on_mesh(sizes: dict[str, int]) -> Iterator[None]:
    if not sizes and jax.process_count() == 1:
        yield
        return
    axes: dict[str, Any] = {**sizes} or {"data": jax.device_count()}
    try:
        with jax.set_mesh(sharding.make_mesh(**axes)):
            yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        reason = f"this process or another one has failed ({str(error).splitlines()[0]})"
        raise OtherProcessError(f"{reason}: start all of them again") from error


def simulate(count: int) -> None:
    """Simulates CPU devices on a machine without accelerators, unless JAX is already initialised.

    Args:
        count: number of devices of this process.
    """
    if count > 1:
        # A collective holds a thread until all devices have joined it, and a device waits in several: with one thread a
        # device, the default, they wait for each other for ever.
        os.environ.setdefault("PJRT_NPROC", str(THREADS * count))
    with suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", count)


def _join(coordinator: str, processes: int, process: int) -> None:
    try:
        if coordinator == AUTO:
            jax.distributed.initialize(initialization_timeout=_ALL_STARTED)
        else:
            jax.distributed.initialize(coordinator, processes, process, initialization_timeout=_ALL_STARTED)
    except (ValueError, RuntimeError) as error:
        raise AntgmmError(f"--coordinator {coordinator}: {str(error).splitlines()[0]}") from error


def parse(text: str) -> dict[str, int]:
    """Parses the option --mesh.

    Args:
        text: for example `data=2,fsdp=2,tensor=2`.

    Returns:
        Mesh axis -> devices.

    Raises:
        AntgmmError: the text is invalid.
    """
    pairs = [part.partition("=") for part in text.split(",") if part]
    sizes = {name.strip(): int(size) for name, _, size in pairs if _SIZE.fullmatch(size)}
    if len(sizes) < text.count(",") + bool(text) or not sizes.keys() <= {*sharding.MESH} or 0 in sizes.values():
        raise AntgmmError(f"--mesh {text}: specify sizes of {', '.join(sharding.MESH)}, as in data=2,fsdp=2,tensor=2")
    return sizes
