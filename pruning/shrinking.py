"""Pruning of parameters: pure functions from a tree of arrays to a smaller one."""

import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from antgmm_jax.config import LMMConfig
from antgmm_jax.families import family
from antgmm_jax.io.convert import open_hf, save_hf
from antgmm_jax.io.stored import Stored, in_memory_order
from antgmm_jax.parallel.sharding import place
from antgmm_jax.pure import functional
from pruning.components import project
from pruning.keep import Keep, is_basis, shrunk_config


def take(tree: Any, axes: Any, keep: Mapping[str, Any]) -> Any:
    """Gathers the kept indices of every array of a tree that is structured like the parameters.

    Results stay on the devices; under a mesh they are sharded according to their new shapes.

    Args:
        tree: nested dict of arrays (parameters, gradients, optimizer moments). NumPy leaves stay NumPy; `Stored` ones
            stay on disk and read only what is kept.
        axes: tree of tuples of axis names, one name per dimension.
        keep: axis -> indices, [k] for a shared axis or [L, k] for a local one, with one row per entry of the leading
            axis (see `array_keep`). Rows of removed entries are ignored.

    Returns:
        The tree, with only the kept indices in each named dimension; without modules that have no unit left.
    """
    taken = jax.tree.map(
        lambda names, leaf: _take(leaf, names, keep), axes, tree, is_leaf=lambda x: isinstance(x, tuple)
    )
    return _left(taken)


def _left(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Removes empty arrays, and branches without other arrays."""
    branches = {name: _left(node) if isinstance(node, Mapping) else node for name, node in tree.items()}
    return {
        name: node for name, node in branches.items() if (node if isinstance(node, Mapping) else 0 not in node.shape)
    }


def _take(leaf: Any, names: tuple[str, ...], keep: Mapping[str, Any]) -> Any:
    if isinstance(leaf, Stored):
        return _take_stored(leaf, names, keep)
    xp: Any = np if isinstance(leaf, np.ndarray) else jnp
    for dim, name in enumerate(names):
        if name not in keep:
            continue
        index = keep[name]
        if index.ndim == 1:
            leaf = xp.take(leaf, index, axis=dim)
            continue
        # The leading axis comes first in `names`, so removed layers are gone already.
        rows = index[keep[names[0]]] if names[0] in keep else index
        shape = [1] * leaf.ndim
        shape[0], shape[dim] = rows.shape
        leaf = xp.take_along_axis(leaf, rows.reshape(shape), axis=dim)
    # Wait for each array: with several processes on CPUs, concurrent programs would mix up their collectives.
    return leaf if xp is np else jax.block_until_ready(place(leaf, names))


def _take_stored(leaf: Stored, names: tuple[str, ...], keep: Mapping[str, Any]) -> Stored:
    """`_take` of an array on disk, layer by layer; within a layer, a local axis has one row of indices."""
    layers, units = (names[0], names[1:]) if leaf.stacked else ("", names)

    def read(row: int) -> np.ndarray:
        source = int(keep[layers][row]) if layers in keep else row
        own = {axis: keep[axis][source] if keep[axis].ndim == 2 else keep[axis] for axis in units if axis in keep}
        part, ordered, back = in_memory_order(leaf.read(source), units)
        return _take(part, ordered, own).transpose(back)

    shape = tuple(keep[name].shape[-1] if name in keep else n for name, n in zip(names, leaf.shape, strict=True))
    return Stored(shape, leaf.dtype, read, leaf.stacked)


def array_keep(config: LMMConfig, keep: Keep) -> dict[str, np.ndarray]:
    """Returns the kept indices that `take` needs, including axes that follow from others.

    Args:
        config: model config before pruning.
        keep: kept units as in `shrink`.

    Returns:
        `keep` with the derived axes of the family added.
    """
    return family(config).depth.array_keep(config, keep)


def shrink(config: LMMConfig, params: Any, keep: Keep) -> tuple[LMMConfig, Any]:
    """Prunes a model to the kept units. It does not check that the sizes are legal; `plan` and `save_hf` do.

    Args:
        config: model config.
        params: model parameters, in memory or `Stored`.
        keep: axis -> ascending int32 indices, [k] for a shared axis or [L, k] for a local one (one row per layer of
            this model, also for layers that are removed), or for a width a basis [n, k] from `principal`. Other axes
            are not pruned.

    Returns:
        Config and parameters of the smaller model.

    Raises:
        AntgmmError: `keep` does not fit the model, no config of the family describes the kept layers, or a basis for an
            axis that has none or for `Stored` parameters.
    """
    smaller = shrunk_config(config, keep)
    bases = {axis: kept for axis, kept in keep.items() if is_basis(kept)}
    if bases:
        config, params = project(config, params, bases)
    indices = {axis: kept for axis, kept in keep.items() if axis not in bases}
    return smaller, take(params, functional(config).axes, array_keep(config, indices))


def shrink_hf(
    source: str | os.PathLike, keep: Keep, directory: str | os.PathLike, *, max_shard_size: str = "5GB"
) -> LMMConfig:
    """Prunes a Hugging Face checkpoint on disk, with one tensor in memory at a time.

    The resulting files are bitwise equal to those of
    `save_hf(*shrink(*load_hf(source), keep), directory, like=source)`.

    Args:
        source: checkpoint folder.
        keep: kept indices as in `shrink`; removed layers are not read.
        directory: folder to create. Config, tokenizer and processor are copied from `source`.
        max_shard_size: larger weights are split into shards with an index.

    Returns:
        Config of the smaller model.

    Raises:
        AntgmmError: as in `shrink`, `load_hf` and `save_hf`.
    """
    config, params = shrink(*open_hf(source), keep)
    save_hf(config, params, directory, like=source, max_shard_size=max_shard_size)
    return config
