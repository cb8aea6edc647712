"""Parameters by path: which are trained, and which a prefix matches."""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import optax

from antgmm_jax.errors import AntgmmError
from antgmm_jax.pure import Params


# Frozen leaves are None. With `optax.selective_transform` instead, their gradients would be computed, summed over
# micro-batches and included in the norm: a step of antgmm-tiny with vision frozen (batch 8, 2 cores of an AMD EPYC,
# minimum of 4, optax 0.2.8, jax 0.10.2, 2026-11-28) takes 97 ms, with optax 112; in two micro-batches 114, optax 182.
def trainable(params: Params, frozen: tuple[str, ...]) -> Params:
    """Returns the trainable parameters: the tree with None for every frozen leaf.

    Args:
        params: nested dict of arrays.
        frozen: path prefixes, parts joined by "/". One that matches nothing has no effect, as a cut may remove all
            parameters under it; `check_paths` finds misspelt ones.

    Returns:
        The tree; optax and `jax.grad` ignore None.

    Raises:
        AntgmmError: all parameters are frozen.
    """
    leaves, treedef = by_path(params)
    kept = [None if any(under(path, prefix) for prefix in frozen) else leaf for path, leaf in leaves.items()]
    if all(leaf is None for leaf in kept):
        raise AntgmmError(f"frozen {', '.join(frozen)} leaves nothing to train")
    return jax.tree.unflatten(treedef, kept)


def check_paths(params: Params, frozen: tuple[str, ...], rates: Sequence[str]) -> None:
    """Checks that path prefixes match parameters.

    Args:
        params: parameters, or their shapes.
        frozen: path prefixes of frozen parameters.
        rates: path prefixes with learning rate factors.

    Raises:
        AntgmmError: a prefix matches no parameter, or all parameters are frozen.
    """
    paths = by_path(params)[0]
    check_prefixes("frozen", frozen, paths)
    trainable(params, frozen)
    check_prefixes("rates of", rates, paths)


def combine(trained: Params, params: Params) -> Params:
    """Fills the leaves of `trained` that are None or masked by optax with those of `params`."""
    return jax.tree.map(lambda new, old: old if is_hole(new) else new, trained, params, is_leaf=is_hole)


def by_path(tree: Params, is_leaf: Callable[[Any], bool] | None = None) -> tuple[dict[str, Any], Any]:
    """Returns the leaves of a tree by path, and its structure.

    Args:
        tree: nested dict of arrays.
        is_leaf: what is a leaf beside arrays, as in `jax.tree.map`.

    Returns:
        {path, parts joined by "/": leaf}, in the order of the tree, and the structure for `jax.tree.unflatten`.
    """
    flat, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    return {"/".join(map(key_name, path)): leaf for path, leaf in flat}, treedef


def under(path: str, prefix: str) -> bool:
    """Whether a path (parts joined by "/") equals the prefix or is below it."""
    return path == prefix or path.startswith(prefix.rstrip("/") + "/")


def longest_prefix(path: str, prefixes: Collection[str]) -> str:
    """Returns the longest of the prefixes that a path is under; "" for none."""
    return max((prefix for prefix in prefixes if under(path, prefix)), key=len, default="")


def check_prefixes(what: str, prefixes: Sequence[str], paths: Collection[str], kind: str = "parameter") -> None:
    """Raises AntgmmError for prefixes that match no path of a kind."""
    if unmatched := [prefix for prefix in prefixes if not any(under(path, prefix) for path in paths)]:
        tops = sorted({path.split("/")[0] for path in paths})
        raise AntgmmError(f"{what} {', '.join(unmatched)} matches no {kind}: top-level names are {', '.join(tops)}")


def key_name(entry: Any) -> str:
    """Name of one entry of a path of `jax.tree_util`."""
    return str(getattr(entry, "key", getattr(entry, "name", getattr(entry, "idx", entry))))


def is_hole(leaf: Any) -> bool:
    """Whether a leaf is that of a frozen parameter, or masked by optax."""
    return leaf is None or is_masked(leaf)


def is_masked(leaf: Any) -> bool:
    """Whether optax masked a leaf."""
    return isinstance(leaf, optax.MaskedNode)
