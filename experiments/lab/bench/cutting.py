"""Pruning on disk of a random checkpoint that is larger than the memory."""

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
    """Writes a checkpoint with uniform random weights in bfloat16, one layer at a time.

    Args:
        config: model config.
        directory: folder to create.
        seed: random seed.
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
    """Creates a random checkpoint of one preset and prunes it to the sizes of another by magnitude.

    Args:
        large: preset of the checkpoint.
        small: preset with the target sizes.
        folder: folder for both checkpoints, which are removed afterwards.

    Returns:
        The figures of `disk_cut.cut`, including the speed of the disk.

    Raises:
        AntgmmError: the folder does not exist.
    """
    if not folder.is_dir():
        raise AntgmmError(f"{folder} is not a folder: create it, with enough space for {large}")
    config = preset(large)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        source = Path(place) / "source"
        say(f"bench: a random {large}")
        random_checkpoint(config, source)
        return cut(source, targets_of(config, small), Path(place) / "cut", records=None, disk=True)
