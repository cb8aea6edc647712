"""What a contender writes down: seconds and loss of every step, peak memory, and its library's matmul rate."""

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
"""Side of the square matrices that give a library's rate."""


def memory(field: str) -> int:
    """Bytes that the process holds now (VmRSS) or held at most (VmHWM); where only the latter is told, that."""
    if (told := resources.memory(field)) is not None:
        return told
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


class Recorder:
    """Collects the figures of one process; made when everything is imported and nothing is loaded.

    Args:
        libraries: distributions whose versions are told.
    """

    def __init__(self, *libraries: str):
        self._versions = {name: importlib.metadata.version(name) for name in libraries}
        self._baseline, self._began = memory("VmRSS"), time.perf_counter()
        self._steps: list[dict[str, float]] = []
        self._more: dict[str, Any] = {}

    def ready(self) -> None:
        """Everything is loaded, compiled and warm: the first timed step begins now."""
        self._last = time.perf_counter()
        self._more["setup_seconds"] = self._last - self._began

    def step(self, loss: float) -> None:
        """A step is done, its loss known; time since the last belongs to it."""
        now = time.perf_counter()
        self._steps.append({"seconds": now - self._last, "loss": float(loss)})
        self._last = time.perf_counter()

    def note(self, **figures: Any) -> None:
        """Further figures, as JSON types."""
        self._more |= figures

    def write(self, out: Path, product: Callable[[], Any], rows: int) -> None:
        """Writes everything; the file appears whole.

        Args:
            out: where to.
            product: one float32 matrix product of `SIDE` by `SIDE`, run to its end; timed after the peak is read.
            rows: samples of a step.
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
    """FLOP/s of a product of two `SIDE` by `SIDE` matrices: the median of several, after one that warms up."""
    seconds = []
    for _ in range(_PRODUCTS + 1):
        began = time.perf_counter()
        product()
        seconds.append(time.perf_counter() - began)
    return 2 * SIDE**3 / statistics.median(seconds[1:])
