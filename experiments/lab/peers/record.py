"""Measurements of a contender: seconds and loss of every step, peak memory, and matmul rate of its library."""

import importlib.metadata
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.run.host import resources

_PRODUCTS = 15
SIDE = 1024
"""Side of the square matrices for the matmul rate."""


def memory(field: str) -> int:
    """Returns current (VmRSS) or peak (VmHWM) memory in bytes; always the peak where only that is available."""
    if (size := resources.memory(field)) is not None:
        return size
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Recorder:
    """Collects the figures of one process; create it after all imports and before loading anything.

    Args:
        libraries: distributions whose versions are recorded.
    """

    def __init__(self, *libraries: str):
        self._versions = {name: importlib.metadata.version(name) for name in libraries}
        self._baseline, self._began = memory("VmRSS"), time.perf_counter()
        self._steps: list[dict[str, float]] = []
        self._more: dict[str, Any] = {}

    def ready(self) -> None:
        """Marks the start of the first measured step."""
        self._last = time.perf_counter()
        self._more["setup_seconds"] = self._last - self._began

    def step(self, loss: float) -> None:
        """Records a step: its loss, and the time since the previous step."""
        now = time.perf_counter()
        self._steps.append({"seconds": now - self._last, "loss": float(loss)})
        self._last = time.perf_counter()

    def note(self, **figures: Any) -> None:
        """Records further figures, as JSON types."""
        self._more |= figures

    def write(self, out: Path, product: Callable[[], Any], rows: int) -> None:
        """Writes all figures atomically.

        Args:
            out: JSON file.
            product: computes a float32 product of `SIDE` x `SIDE` matrices; it is measured after reading peak memory.
            rows: samples per step.
        """
        figures = {
            "versions": self._versions,
            "baseline_bytes": self._baseline,
            "peak_bytes": memory("VmHWM"),
            **self._more,
            "rows": rows,
            "steps": self._steps,
            "matmul_flops_per_second": rate(product),
        }
        temporary = out.with_name(f".{out.name}")
        temporary.write_text(json.dumps(figures) + "\n")
        os.replace(temporary, out)


def rate(product: Callable[[], Any]) -> float:
    """Returns the median FLOP/s of a product of two `SIDE` x `SIDE` matrices, after a warm-up."""
    seconds = []
    for _ in range(_PRODUCTS + 1):
        began = time.perf_counter()
        product()
        seconds.append(time.perf_counter() - began)
    return 2 * SIDE**3 / statistics.median(seconds[1:])
