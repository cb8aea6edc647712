"""Gates that close pruned units, all at once or gradually."""

from collections.abc import Mapping

import numpy as np

from antgmm_jax.axes import sizes
from antgmm_jax.config import LMMConfig
from antgmm_jax.errors import AntgmmError
from antgmm_jax.pure import local_axes
from pruning.importance import scores_for
from pruning.keep import Keep, check, gate_shape, is_basis


def ones(config: LMMConfig) -> dict[str, np.ndarray]:
    """Returns open gates for every axis.

    Args:
        config: model config.

    Returns:
        axis -> float32 ones, [n] for a shared axis or [L, n] for a local one.
    """
    present, local = sizes(config), local_axes(config)
    return {axis: np.ones(gate_shape(axis, present, local), np.float32) for axis in present}


def gates_of(keep: Keep, config: LMMConfig) -> dict[str, np.ndarray]:
    """Returns gates that are 1 for kept units and 0 elsewhere; with them, the model computes what the shrunk one does.

    Args:
        keep: axis -> kept indices of this model, [k] for a shared axis or [L, k] for a local one; rows of -1 (for
            removed layers) give closed gates.
        config: model config.

    Returns:
        axis -> float32 gates, [n] or [L, n], for the axes of `keep`.

    Raises:
        AntgmmError: `keep` does not fit the model, or contains a basis.
    """
    check(config, keep)
    if bases := [axis for axis, kept in keep.items() if is_basis(kept)]:
        raise AntgmmError(f"{bases[0]} is pruned to a basis, for which there are no gates; prune it at once")
    present, local = sizes(config), local_axes(config)
    gates = {axis: np.zeros(gate_shape(axis, present, local), np.float32) for axis in keep}
    for axis, index in keep.items():
        rows, kept = np.atleast_2d(gates[axis]), np.atleast_2d(index)
        known = (kept >= 0).all(axis=1)
        rows[known] = _scatter(kept[known], present[axis])
    return gates


def _scatter(kept: np.ndarray, size: int) -> np.ndarray:
    rows = np.zeros((len(kept), size), np.float32)
    np.put_along_axis(rows, kept, 1.0, axis=1)
    return rows


def gates_at(keep: Keep, scores: Mapping[str, np.ndarray], config: LMMConfig, fraction: float) -> dict[str, np.ndarray]:
    """Returns gates that close a fraction of the units that `keep` removes, those with the lowest scores first.

    Per axis and layer, `floor(fraction * units to remove)` gates are 0; a closed unit stays closed for every larger
    fraction.

    Args:
        keep: axis -> kept indices of this model, [k] or [L, k].
        scores: axis -> importance, [n] or [L, n], at least for every pruned axis.
        config: model config.
        fraction: from 0 (all open) to 1 (equal to `gates_of`).

    Returns:
        axis -> float32 gates of 0 and 1, [n] or [L, n], for the axes of `keep`.

    Raises:
        AntgmmError: a fraction outside 0..1, or a pruned axis without finite scores of its shape.
    """
    if not 0 <= fraction <= 1:
        raise AntgmmError(f"fraction of closed gates is {fraction}: expected 0 to 1")
    final = gates_of(keep, config)
    return {axis: _close(axis, gate, scores, fraction) if (gate == 0).any() else gate for axis, gate in final.items()}


def _close(axis: str, final: np.ndarray, scores: Mapping[str, np.ndarray], fraction: float) -> np.ndarray:
    score = scores_for(axis, scores, final.shape)
    # Kept units rank last. The order does not depend on `fraction`, so closed units stay closed.
    order = np.argsort(np.where(final == 1, np.inf, score), axis=-1, kind="stable")
    rank = np.argsort(order, axis=-1, kind="stable")
    closed = np.floor((final == 0).sum(axis=-1, keepdims=True) * fraction + 1e-6)
    return np.where(rank < closed, 0.0, 1.0).astype(np.float32)
