"""Parameters on the devices: read tensor by tensor, and split over the mesh if there is one."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from antgmm_jax.config import LMMConfig
from antgmm_jax.io.stored import Stored
from antgmm_jax.parallel import processes, sharding
from antgmm_jax.pure import Params, functional

WHOLE = 1 << 28
"""Bytes up to which a stack of layers is read at once. Larger stacks are read layer by layer."""


def on_devices(config: LMMConfig, params: Params, dtype: DTypeLike | Params | None = None) -> Params:
    """Returns parameters as JAX arrays, sharded by the rules of the mesh if there is one.

    `Stored` parameters are read one tensor or layer at a time: the host never holds the model. The arrays that result
    from `Stored` and NumPy parameters share no memory with them, so a train step may donate them.

    Args:
        config: model config.
        params: `Stored`, NumPy or JAX parameters.
        dtype: dtype of the result, or a tree with that of each parameter; None keeps the dtype of each parameter.

    Returns:
        The parameters.
    """
    leaves, treedef = jax.tree.flatten(params)
    del params  # so that each array of a caller that keeps none is freed once it is cast
    dtypes = treedef.flatten_up_to(dtype) if isinstance(dtype, Mapping) else [dtype] * len(leaves)
    for at, (names, of) in enumerate(zip(treedef.flatten_up_to(functional(config).axes), dtypes, strict=True)):
        leaves[at] = placed(leaves[at], names, dtype=of)
    return treedef.unflatten(leaves)


def on_first(config: LMMConfig, params: Params, dtype: DTypeLike) -> Params:
    """Returns parameters on the first device of the first process; all processes call it together.

    They gather one tensor or layer at a time.

    Args:
        config: model config.
        params: `Stored`, NumPy or JAX parameters.
        dtype: dtype of the result.

    Returns:
        The parameters; in the other processes, a tree of None.

    Raises:
        AntgmmError: in the other processes, if the first one failed, for example as its device has too little memory.
    """
    leaves, treedef = jax.tree.flatten(params)
    axes = treedef.flatten_up_to(functional(config).axes)
    gathered = [_gathered(leaf, names) for leaf, names in zip(leaves, axes, strict=True)]

    def place(parts: Iterator[np.ndarray]) -> list[jax.Array]:
        sources = [
            leaf if stored is None else replace(stored, read=lambda row: next(parts))
            for leaf, stored in zip(leaves, gathered, strict=True)
        ]
        return [placed(leaf, names, dtype=dtype) for leaf, names in zip(sources, axes, strict=True)]

    parts = chain.from_iterable(stored.parts() for stored in gathered if stored is not None)
    return treedef.unflatten(processes.run_on_first_with(parts, place) or [None] * len(leaves))


def _gathered(leaf: Any, names: Sequence[str]) -> Stored | None:
    """A split array, of which all processes gather the parts together; None for other leaves."""
    if not isinstance(leaf, jax.Array) or len(leaf.sharding.device_set) == 1:
        return None
    stacked = names[0].endswith("layers")
    return Stored(leaf.shape, leaf.dtype, lambda row: processes.gather(leaf if row < 0 else leaf[row]), stacked)


def placed(leaf: Any, names: Sequence[str], *, dtype: DTypeLike | None = None) -> jax.Array:
    """Returns one parameter as a JAX array, as in `on_devices`.

    Args:
        leaf: the parameter.
        names: names of its axes.
        dtype: dtype of the result; None keeps that of the parameter.

    Returns:
        The parameter.
    """
    dtype = jax.dtypes.canonicalize_dtype(leaf.dtype if dtype is None else dtype)
    if isinstance(leaf, jax.Array):
        return sharding.place(leaf, names).astype(dtype)
    if isinstance(leaf, Stored) and leaf.stacked and leaf.nbytes > WHOLE:
        return _layer_by_layer(leaf, names, dtype)
    return _split(np.asarray(leaf, dtype), sharding.spec(names, leaf.shape) if sharding.active() else None)


def _split(values: np.ndarray, spec: PartitionSpec | None) -> jax.Array:
    """Copies an array, of which every process holds the whole, to the devices."""
    if spec is None:
        return jnp.array(values)
    where = NamedSharding(jax.sharding.get_mesh(), spec)
    return jax.make_array_from_callback(values.shape, where, lambda index: values[index].copy())


def _layer_by_layer(leaf: Stored, names: Sequence[str], dtype: np.dtype) -> jax.Array:
    """Reads a stack of layers into an array on the devices, with one layer on the host."""
    spec = sharding.spec(names, leaf.shape) if sharding.active() else None
    where = None if spec is None else NamedSharding(jax.sharding.get_mesh(), spec)
    stack = jax.jit(partial(jnp.zeros, leaf.shape, dtype), out_shardings=where)()
    for row, part in enumerate(leaf.parts()):
        layer = _split(part.astype(dtype), None if spec is None else PartitionSpec(*spec[1:]))
        stack = jax.block_until_ready(_with_layer(stack, layer, row))
    return stack


@partial(jax.jit, donate_argnums=0)
def _with_layer(stack: jax.Array, layer: jax.Array, row: int | jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stack, layer, row, 0)
