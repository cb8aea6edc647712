"""The leaves of a tree by name: what a checkpoint says of them, and what it has to give back in their place."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from antgmm_jax.errors import AntgmmError
from antgmm_jax.parallel import sharding


def named_leaves(tree: Any) -> dict[str, tuple[list[str], Any]]:
    """Leaf name -> (keys on the way to it, leaf), in the order of `jax.tree.leaves`.

    Raises:
        TypeError: a leaf that is no array, or has no name of its own.
    """
    named = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        keys = [jax.tree_util.keystr((entry,), simple=True) for entry in path]
        name = ".".join(keys)
        if not isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct):
            raise TypeError(f"leaf {name!r} is a {type(leaf).__name__}, not an array; put it into the record instead")
        if name in named or not keys:
            raise TypeError(f"leaf {name!r} has no name of its own; hold it in a dict under another key")
        named[name] = (keys, leaf)
    return named


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def plain(leaf: Any) -> Any:
    """A leaf as an array that can be stored: a typed PRNG key as its data."""
    if _is_key(leaf):
        return jax.random.key_data(leaf)
    return np.asarray(leaf) if isinstance(leaf, np.generic) else leaf


def describe(leaf: Any) -> dict[str, Any]:
    """Shape and dtype of what is stored of a leaf, as JSON types."""
    aval = jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf
    return {"shape": list(aval.shape), "dtype": np.dtype(aval.dtype).name}


def target_of(leaf: Any) -> Any:
    """What Orbax is asked for in place of `leaf`: the same kind of array with the same sharding."""
    if _is_key(leaf):
        aval = jax.eval_shape(jax.random.key_data, leaf)
        return np.empty(aval.shape, aval.dtype)
    if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding or sharding.everywhere())
    return np.asarray(leaf)


def as_like(like: Any, array: Any) -> Any:
    """What was read, as the same kind of array as `like`, on its devices."""
    if _is_key(like):
        return jax.random.wrap_key_data(array, impl=jax.random.key_impl(like))
    if isinstance(like, jax.Array | jax.ShapeDtypeStruct):
        return array if isinstance(array, jax.Array) else jax.device_put(array, like.sharding)
    return array


def assert_same_leaves(folder: Path, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raises AntgmmError where saved leaves are not those wanted: Orbax would cast a wrong dtype in silence."""
    for name in sorted(saved.keys() | wanted.keys()):
        found = {key: saved[name][key] for key in ("shape", "dtype")} if name in saved else "absent"
        expected = wanted.get(name, "absent")
        if found != expected:
            raise AntgmmError(
                f"{folder} does not fit this run: {name!r} is {found}, not {expected}; remove it or use its own recipe"
            )
