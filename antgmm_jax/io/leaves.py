"""Names and descriptions of the leaves of a tree, for checkpoints."""

from collections.abc import Mapping
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from antgmm_jax.errors import AntgmmError
from antgmm_jax.parallel import sharding

_FLOATS = frozenset(("bfloat16", "float16", "float32"))


def named_leaves(tree: Any) -> dict[str, tuple[list[str], Any]]:
    """Returns leaf name -> (keys of its path, leaf), in the order of `jax.tree.leaves`.

    Raises:
        TypeError: a leaf is not an array, or its name is not unique.
    """
    named = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        keys = [jax.tree_util.keystr((entry,), simple=True) for entry in path]
        name = ".".join(keys)
        if not isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct):
            raise TypeError(f"leaf {name!r} is a {type(leaf).__name__}, not an array; put it into the record instead")
        if name in named or not keys:
            raise TypeError(f"leaf {name!r} has no unique name; put it into a dict under another key")
        named[name] = (keys, np.asarray(leaf) if isinstance(leaf, np.generic) else leaf)
    return named


def describe(leaf: Any) -> dict[str, Any]:
    """Returns the shape and dtype of a leaf as JSON types."""
    return {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}


def checked_leaves(leaves: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns a checkpoint's table of leaves, name -> `path`, `shape` and `dtype`, after checking that it is one.

    Raises:
        ValueError, TypeError, KeyError: it is not.
    """
    for leaf in leaves.values():
        if not leaf["path"] or not all(isinstance(key, str) for key in leaf["path"]):
            raise ValueError(leaf["path"])
        if not all(type(size) is int and size >= 0 for size in leaf["shape"]):
            raise ValueError(leaf["shape"])
        if not isinstance(leaf["dtype"], str):
            raise TypeError(leaf["dtype"])
    return {**leaves}


def as_saved(leaf: Any, saved: dict[str, Any] | None) -> Any:
    """Returns a leaf to restore with the floating-point dtype that a checkpoint's table has for it.

    Args:
        leaf: the leaf.
        saved: `shape` and `dtype`, from `describe`; None if the table lacks it.
    """
    if saved is None or str(leaf.dtype) == saved["dtype"] or not {str(leaf.dtype), saved["dtype"]} <= _FLOATS:
        return leaf
    if isinstance(leaf, np.ndarray):
        return leaf.astype(saved["dtype"])
    return jax.ShapeDtypeStruct(leaf.shape, saved["dtype"], sharding=leaf.sharding)


def target_at(leaf: dict[str, Any], axes: Mapping[str, Any] | None) -> Any:
    """Returns the target for a leaf of a checkpoint's table: an empty NumPy array, or its shape with a sharding.

    Args:
        leaf: `path`, `shape` and `dtype`, from `describe`.
        axes: tree of tuples of axis names; None for a NumPy array.
    """
    if axes is None:
        return np.empty(leaf["shape"], leaf["dtype"])
    names: Any = reduce(getitem, leaf["path"], axes)
    return sharding.place(jax.ShapeDtypeStruct(leaf["shape"], leaf["dtype"]), names)


def target_of(leaf: Any) -> Any:
    """Returns the target for Orbax to restore `leaf`: the same kind of array with the same sharding."""
    if isinstance(leaf, np.ndarray):
        return leaf
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding or sharding.replicated())


def empty(target: Any) -> Any:
    """Returns the array without elements for a target; Orbax does not store those."""
    if isinstance(target, np.ndarray):
        return target
    return jnp.zeros(target.shape, target.dtype, device=target.sharding)


def assert_same_leaves(folder: Path, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raises AntgmmError if saved leaves differ from `wanted`: Orbax would silently cast a wrong dtype."""
    for name in sorted(saved.keys() | wanted.keys()):
        actual = {key: saved[name][key] for key in ("shape", "dtype")} if name in saved else "absent"
        expected = wanted.get(name, "absent")
        if actual != expected:
            raise AntgmmError(
                f"{folder} does not fit this run: {name!r} is {actual}, not {expected}; remove it or use its own recipe"
            )
