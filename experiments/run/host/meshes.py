"""The devices and processes of a run: matters of the machine, which no recipe names."""

import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import jax

from antgmm_jax.errors import AntgmmError
from antgmm_jax.parallel import sharding
from antgmm_jax.parallel.processes import first
from experiments.run.host.console import CONSOLE

AUTO = "auto"


@contextmanager
def devices(mesh: str, coordinator: str, processes: int, process: int) -> Iterator[None]:
    """Joins the processes of the run, and holds its mesh as JAX's own.

    Args:
        mesh: `AXIS=N,...` with axes of `sharding.MESH`; "" is one device, or `data` over all of several processes.
        coordinator: HOST:PORT of process 0; "auto" asks JAX to find it in a Slurm or Kubernetes job; "" is one process.
        processes: how many there are; read with HOST:PORT only.
        process: which of them this is, from 0.

    Raises:
        AntgmmError: a mesh that cannot be read or is larger than the machine, processes without a coordinator, or
            processes that do not meet or part.
    """
    if processes > 1 and not coordinator:
        raise AntgmmError(f"--processes {processes}: say where they meet, --coordinator HOST:PORT, and start each")
    sizes = parse(mesh)
    if sizes:
        simulate(max(math.prod(sizes.values()) // processes, 1))
    if coordinator:
        _join(coordinator, processes, process)
        CONSOLE.quiet = not first()
    if not sizes and jax.process_count() == 1:
        yield
        return
    try:
        with jax.set_mesh(sharding.make_mesh(**sizes or {"data": jax.device_count()})):
            yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        reason = str(error).splitlines()[0]
        raise AntgmmError(f"this process or one that it waited for has failed ({reason}): start all again") from error


def simulate(count: int) -> None:
    """Makes a machine without accelerators one of as many CPU devices as are asked for, unless JAX already runs.

    Args:
        count: devices of this process.
    """
    with suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", count)


def _join(coordinator: str, processes: int, process: int) -> None:
    # Its handler keeps a process alive that is told to end (SIGTERM); a run goes on from its last checkpoint anyway.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        if coordinator == AUTO:
            jax.distributed.initialize()
        else:
            jax.distributed.initialize(coordinator, processes, process)
    except (ValueError, RuntimeError) as error:
        raise AntgmmError(f"--coordinator {coordinator}: {str(error).splitlines()[0]}") from error


def parse(text: str) -> dict[str, int]:
    """Mesh sizes as they are typed.

    Args:
        text: such as `data=2,fsdp=2,tensor=2`.

    Returns:
        Mesh axis -> devices.

    Raises:
        AntgmmError: it cannot be read so.
    """
    pairs = [part.partition("=") for part in text.split(",") if part]
    sizes = {name.strip(): int(size) for name, _, size in pairs if size.strip().isdecimal()}
    if len(sizes) < len(pairs) or not sizes.keys() <= {*sharding.MESH} or 0 in sizes.values():
        raise AntgmmError(f"--mesh {text}: give sizes of {', '.join(sharding.MESH)}, as in data=2,fsdp=2,tensor=2")
    return sizes
