"""A checkpoint too large for the machine's memory, of random weights, cut on disk."""

import tempfile
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from antgmm_jax.config import LMMConfig
from antgmm_jax.errors import AntgmmError
from antgmm_jax.io.convert import save_hf
from antgmm_jax.io.stored import Stored
from antgmm_jax.presets import preset
from antgmm_jax.pure import abstract, functional, is_axes
from experiments.run.disk_cut import cut, targets_of
from experiments.run.host.console import say


def random_checkpoint(config: LMMConfig, directory: Path, *, seed: int = 0) -> None:
    """Writes a checkpoint of uniform random weights in bfloat16, drawn one layer at a time.

    Args:
        config: the model.
        directory: where to; must not exist yet.
        seed: another seed is another model.
    """
    dtype = np.dtype(ml_dtypes.bfloat16)

    def stored(number: int, names: tuple[str, ...], shape: tuple[int, ...]) -> Stored:
        stacked = names[0].endswith("layers")

        def read(row: int) -> np.ndarray:
            rng = np.random.default_rng((seed, number, row + 1))
            return (rng.random(shape[1:] if stacked else shape, np.float32) - np.float32(0.5)).astype(dtype)

        return Stored(shape, dtype, read, stacked)

    shapes, structure = jax.tree.flatten(abstract(config))
    names = jax.tree.leaves(functional(config).axes, is_leaf=is_axes)
    leaves = [stored(n, *pair) for n, pair in enumerate(zip(names, (leaf.shape for leaf in shapes), strict=True))]
    save_hf(config, jax.tree.unflatten(structure, leaves), directory)


def shrinking(large: str, small: str, folder: Path) -> dict[str, Any]:
    """Makes a random checkpoint of one preset and cuts it to the sizes of another by magnitude.

    Args:
        large: preset of the model that is made.
        small: preset whose sizes it is cut to.
        folder: where both are written, and removed afterwards.

    Returns:
        The figures of `disk_cut.cut`, with the disk's own speed.

    Raises:
        AntgmmError: there is no such folder.
    """
    if not folder.is_dir():
        raise AntgmmError(f"{folder} is no folder: make it, with room for the {large}")
    config = preset(large)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        source = Path(place) / "source"
        say(f"bench: a random {large}")
        random_checkpoint(config, source)
        return cut(source, targets_of(config, small), Path(place) / "cut", disk=True)
