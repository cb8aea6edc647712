"""Compilers of accelerators, which run on a machine without one."""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

from antgmm_jax.errors import AntgmmError
from antgmm_jax.extras import install
from experiments.lab.planning.chips import CHIPS

CUDA = tuple(f"jax-cuda12-{part}=={version('jaxlib')}" for part in ("plugin", "pjrt"))
"""Packages of NVIDIA's compiler. They get a folder of their own: in an environment that has them, JAX writes errors at
each start on a machine without a GPU."""

# Only compiles: no search for chips, none reserved, and other processes may compile at the same time.
_TPU_ONLY_COMPILES = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
_SLICES = {
    2: {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"},
    3: {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8", 512: "8x8x8"},
}
"""Dimensions of a TPU's network -> number of chips -> the usual slice."""

_GPU = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: {bandwidth} l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: {memory} shared_memory_per_block_optin: 232448
  cuda_compute_capability {{ major: 9 minor: 0 }} registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 8 patch: 0 }} device_description_str: "{kind}"
"""


def folder() -> Path:
    """Returns the folder of compilers that Python does not search: in its environment, but not among its packages."""
    return Path(sys.prefix) / "share" / "antgmm-jax" / "compilers"


def check(chip: str) -> None:
    """Checks that the compiler of a chip is installed, and lets this process import it.

    Args:
        chip: a key of `CHIPS`.

    Raises:
        AntgmmError: it is not installed; the message has the command that installs it.
    """
    where, tpu = str(folder()), bool(CHIPS[chip].slices)
    if not tpu and where not in sys.path:  # NVIDIA's library prints two lines where there is no driver
        sys.path.append(where)
    plugins = () if tpu or find_spec("jax_plugins") is None else ("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13")
    if not any(map(find_spec, ("libtpu",) if tpu else plugins)):
        remedy = install("plan") if tpu else f"pip install --no-deps --target {where} {' '.join(CUDA)}"
        raise AntgmmError(f"--chip {chip}: its compiler is not installed: {remedy} (or add --compiler cpu)")


def only_compile() -> None:
    """Keeps JAX from reserving the accelerators of this machine; to be called before JAX is initialised."""
    jax.config.update("jax_platforms", "cpu")


@contextmanager
def not_cached() -> Iterator[None]:
    """A context in which JAX stores no programs: it cannot read those of devices that are not there."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, float("inf"))
    try:
        yield
    finally:
        jax.config.update(name, before)


def slice_of(chip: str, count: int) -> str:
    """Returns the usual slice of a number of chips.

    Args:
        chip: a key of `CHIPS`.
        count: number of chips.

    Returns:
        Shape of the slice, such as "4x4"; for GPUs "1x1x8": one group of machines, machines, GPUs per machine.

    Raises:
        AntgmmError: there is no slice of this size.
    """
    spec = CHIPS[chip]
    if not spec.slices:
        machines = -(-count // spec.island)
        if count % machines:
            raise AntgmmError(f"{count} {chip}: use a multiple of {spec.island}, the number in a machine")
        return f"1x{machines}x{count // machines}"
    sizes = {size: shape for size, shape in _SLICES[spec.slices].items() if size <= spec.island}
    if count not in sizes:
        raise AntgmmError(f"{count} {chip}: slices have {', '.join(map(str, sizes))} chips")
    return sizes[count]


def devices(chip: str, count: int) -> Sequence[Any]:
    """Returns devices to compile for, which need not exist.

    Args:
        chip: a key of `CHIPS`; `check` has been called.
        count: number of devices.

    Returns:
        Devices for a mesh.

    Raises:
        AntgmmError: there is no slice of this size.
    """
    shape, spec = slice_of(chip, count), CHIPS[chip]
    if not spec.slices:
        target = _GPU.format(bandwidth=int(spec.bandwidth), memory=int(spec.memory), kind=spec.kind)
        return topologies.get_topology_desc(
            platform="cuda", topology_name="", topology=shape, target_config=target
        ).devices
    for name, value in (_TPU_ONLY_COMPILES | {"TPU_ACCELERATOR_TYPE": spec.slice_type}).items():
        os.environ.setdefault(name, value)
    options = {"chips_per_host_bounds": [1, 1, 1]} if count == 1 else {}
    return topologies.get_topology_desc(platform="tpu", topology_name=f"{chip}:{shape}", **options).devices
