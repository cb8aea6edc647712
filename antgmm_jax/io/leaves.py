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
        named[name] = (keys, np.asarray(leaf) if isinstance(leaf, np.generic) else leaf)
    return named


def describe(leaf: Any) -> dict[str, Any]:
    """Shape and dtype of a leaf, as JSON types."""
    return {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}


def target_of(leaf: Any) -> Any:
    """What Orbax is asked for in place of `leaf`: the same kind of array with the same sharding."""
    if isinstance(leaf, np.ndarray):
        return leaf
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding or sharding.everywhere())


def empty(target: Any) -> Any:
    """An array of no elements in place of a `target_of`; Orbax does not store those."""
    if isinstance(target, np.ndarray):
        return target
    return jnp.zeros(target.shape, target.dtype, device=target.sharding)


def assert_same_leaves(folder: Path, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raises AntgmmError where saved leaves are not those wanted: Orbax would cast a wrong dtype in silence."""
    for name in sorted(saved.keys() | wanted.keys()):
        found = {key: saved[name][key] for key in ("shape", "dtype")} if name in saved else "absent"
        expected = wanted.get(name, "absent")
        if found != expected:
            raise AntgmmError(
                f"{folder} does not fit this run: {name!r} is {found}, not {expected}; remove it or use its own recipe"
            )
