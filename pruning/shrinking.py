"""Cut a model by index or to a basis: pure functions from one tree of arrays to a smaller one."""

from __future__ import annotations

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
from pruning.components import projected
from pruning.keep import Keep, is_basis, shrunk_config


def take(tree: Any, axes: Any, keep: Mapping[str, Any]) -> Any:
    """Gather the kept indices of every array of a params-shaped tree; dtypes and devices stay as they are.

    Under a mesh each result lies where the rules put an array of its new shape; none goes through the host.

    Args:
        tree: nested dict of arrays (parameters, gradients, optimizer moments); numpy leaves stay numpy, and of `Stored`
            ones only what is kept is read, when the result is.
        axes: the same tree, each leaf a tuple of axis names, one a dimension.
        keep: axis -> indices: shared [k], or local [L, k] with one row for each entry of the leaf's leading axis (see
            `array_keep`). Rows of entries that the same keep drops are not read.

    Returns:
        The tree with each named dimension cut to the kept indices.
    """
    return jax.tree.map(
        lambda names, leaf: _take(leaf, names, keep), axes, tree, is_leaf=lambda x: isinstance(x, tuple)
    )


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
        # The leading axis comes first, so that rows of dropped layers are gone before the others are gathered.
        rows = index[keep[names[0]]] if names[0] in keep else index
        shape = [1] * leaf.ndim
        shape[0], shape[dim] = rows.shape
        leaf = xp.take_along_axis(leaf, rows.reshape(shape), axis=dim)
    # One by one: several processes on CPUs would run arrays' programs side by side, and mix up what they exchange.
    return leaf if xp is np else jax.block_until_ready(place(leaf, names))


def _take_stored(leaf: Stored, names: tuple[str, ...], keep: Mapping[str, Any]) -> Stored:
    """The same cut of each layer by itself: there the indices of a local axis are one row."""
    layers, units = (names[0], names[1:]) if leaf.stacked else ("", names)

    def read(row: int) -> np.ndarray:
        source = int(keep[layers][row]) if layers in keep else row
        own = {axis: keep[axis][source] if keep[axis].ndim == 2 else keep[axis] for axis in units if axis in keep}
        part, lying, back = in_memory_order(leaf.read(source), units)
        return _take(part, lying, own).transpose(back)

    shape = tuple(keep[name].shape[-1] if name in keep else n for name, n in zip(names, leaf.shape, strict=True))
    return Stored(shape, leaf.dtype, read, leaf.stacked)


def array_keep(config: LMMConfig, keep: Keep) -> dict[str, np.ndarray]:
    """The keep that `take` needs for this model's arrays: with indices of what follows from other axes.

    Args:
        config: the config of the model that is cut.
        keep: as in `shrink`.

    Returns:
        `keep`, and what its family derives from it.
    """
    return family(config).depth.array_keep(config, keep)


def shrink(config: LMMConfig, params: Any, keep: Keep) -> tuple[LMMConfig, Any]:
    """Cut a model to the kept units. Whether the shape is legal to serve is not checked: `plan` and `save_hf` do that.

    Args:
        config: the config of `params`.
        params: its parameters, in memory or `Stored`.
        keep: axis -> int32 indices sorted ascending, shared [k] or local [L, k], in the coordinates of this model (one
            row for each of its layers, also when layers are cut in the same call), or a basis [n, k] of a width from
            `principal`; an axis left out stays whole.

    Returns:
        The config and the parameters of the smaller model.

    Raises:
        AntgmmError: for a keep that does not describe this model, or layers that no config of its family describes;
            for a basis of a width that has none, or of `Stored` parameters.
    """
    smaller = shrunk_config(config, keep)
    bases = {axis: kept for axis, kept in keep.items() if is_basis(kept)}
    if bases:
        params = projected(config, params, bases)
    indices = {axis: kept for axis, kept in keep.items() if axis not in bases}
    return smaller, take(params, functional(config).axes, array_keep(config, indices))


def shrink_hf(
    source: str | os.PathLike, keep: Keep, directory: str | os.PathLike, *, max_shard_size: str = "5GB"
) -> LMMConfig:
    """Cut a Hugging Face checkpoint on disk, one tensor in memory at a time.

    The files are those of `save_hf(*shrink(*load_hf(source), keep), directory, like=source)`, bit for bit.

    Args:
        source: the checkpoint.
        keep: indices as in `shrink`; layers that it drops are not read.
        directory: where to; must not exist yet. Config, tokenizer and processor are carried over.
        max_shard_size: above it the weights are split into shards with an index.

    Returns:
        The config of the smaller model.

    Raises:
        AntgmmError: as `shrink`, `load_hf` and `save_hf`.
    """
    config, params = shrink(*open_hf(source), keep)
    save_hf(config, params, directory, like=source, max_shard_size=max_shard_size)
    return config
