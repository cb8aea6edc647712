"""Starts a contender as a process: `python -m experiments.lab.peers.starting MODULE WORK OUT MODE`."""

import importlib
import sys
from importlib.machinery import PathFinder
from pathlib import Path

TORCH = frozenset({"torch", "torchvision"})
NEEDS_TORCH = "trl_gkd"


class WithoutTorch(PathFinder):
    """Hides PyTorch from imports, so that transformers does not import it in JAX contenders."""

    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        """Finds a module; None for PyTorch, as if it were not installed."""
        return None if fullname in TORCH else super().find_spec(fullname, path, target)


def start(module: str, work: Path, out: Path, mode: str) -> None:
    """Runs a contender.

    Args:
        module: module of this package that runs it.
        work: folder of the task.
        out: JSON file to write.
        mode: mode of the contender.
    """
    if module != NEEDS_TORCH:
        sys.meta_path[sys.meta_path.index(PathFinder)] = WithoutTorch
    importlib.import_module(f"experiments.lab.peers.{module}").main(work, out, mode)


if __name__ == "__main__":
    name, work, out, mode = sys.argv[1:]
    start(name, Path(work), Path(out), mode)
