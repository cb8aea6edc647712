"""Facts about the machine of a measurement."""

import os
import platform
from pathlib import Path
from typing import Any

import jax


def machine() -> dict[str, Any]:
    """Returns CPU, cores, JAX device, load and operating system."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = lines[0].split(":", 1)[1].strip() if lines else name
    return {
        "cpu": name,
        "cores": os.cpu_count(),
        "device": jax.devices()[0].device_kind,
        "load": round(os.getloadavg()[0], 2),
        "system": platform.platform(),
    }
