"""Which devices JAX looks for: a machine without accelerators that has a TPU's compiler is no TPU."""

import os
import sys
from glob import glob
from importlib.util import find_spec

DEVICES = ("/dev/accel*", "/dev/vfio/[0-9]*", "/dev/nvidia*", "/dev/dxg", "/dev/kfd")
"""Device files of TPUs and of GPUs of NVIDIA (also under Windows) and AMD."""
GPU = "/dev/nvidia[0-9]*"


def only_cpu() -> bool:
    """Whether a machine with libtpu, the compiler that `antgmm plan` uses, has no accelerator."""
    return sys.platform == "linux" and find_spec("libtpu") is not None and not any(map(glob, DEVICES))


def unused_gpu() -> bool:
    """Whether JAX computes on the CPU although the machine has a GPU of NVIDIA.

    JAX only logs why: its plugin is not installed, the driver is too old, or CUDA's libraries are of another version.
    """
    if not glob(GPU) or "JAX_PLATFORMS" in os.environ:
        return False
    import jax  # which takes a second, and `--help` needs no devices

    return jax.default_backend() == "cpu"


def skip_absent_tpu() -> None:
    """Makes JAX use the CPU on such a machine, unless JAX_PLATFORMS is set; call it before JAX is used.

    Otherwise libtpu looks for a TPU, prints five lines of warnings, and holds a lock that other processes stumble over.
    """
    if only_cpu():
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
