"""Starts a contender as a process: `python -m experiments.lab.peers.starting MODULE WORK OUT MODE`."""

import importlib
import sys
from importlib.machinery import PathFinder
from pathlib import Path

TORCH = frozenset({"torch", "torchvision"})
NEEDS_TORCH = "trl_gkd"


class WithoutTorch(PathFinder):
    """Finds what is installed, but for PyTorch: what `transformers` would import of it, no JAX contender reads."""

    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        """As the import system asks; None for PyTorch, as where it is not installed."""
        return None if fullname in TORCH else super().find_spec(fullname, path, target)


def start(module: str, work: Path, out: Path, mode: str) -> None:
    """Runs a contender to its end.

    Args:
        module: the file of this package that runs it.
        work: the task's folder.
        out: JSON file to write.
        mode: what the contender is asked for.
    """
    if module != NEEDS_TORCH:
        sys.meta_path[sys.meta_path.index(PathFinder)] = WithoutTorch
    importlib.import_module(f"experiments.lab.peers.{module}").main(work, out, mode)


if __name__ == "__main__":
    name, work, out, mode = sys.argv[1:]
    start(name, Path(work), Path(out), mode)
