"""Gates that close the units a keep leaves out: all at once, or a few at a time."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from antgmm_jax.axes import sizes
from antgmm_jax.config import LMMConfig
from antgmm_jax.errors import AntgmmError
from antgmm_jax.pure import local_axes
from pruning.importance import scores_for
from pruning.keep import Keep, check, gate_shape, is_basis


def ones(config: LMMConfig) -> dict[str, np.ndarray]:
    """Open gates for every axis.

    Args:
        config: the model's config.

    Returns:
        axis -> float32 ones: shared [n], local [L, n].
    """
    present, local = sizes(config), local_axes(config)
    return {axis: np.ones(gate_shape(axis, present, local), np.float32) for axis in present}


def gates_of(keep: Keep, config: LMMConfig) -> dict[str, np.ndarray]:
    """Gates of 1 at the kept units and 0 elsewhere, for which the model computes what the shrunk one does.

    Args:
        keep: axis -> indices, shared [k] or local [L, k], in the coordinates of this model; rows of -1 (layers that the
            keep drops) give closed gates.
        config: the model's config.

    Returns:
        axis -> float32 gates, shared [n] or local [L, n], for the axes of `keep`.

    Raises:
        AntgmmError: for a keep that does not describe this model, or holds a basis.
    """
    check(config, keep)
    if bases := [axis for axis, kept in keep.items() if is_basis(kept)]:
        raise AntgmmError(f"{bases[0]} is cut to a basis, for which there are no gates; cut it at once")
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
    """Gates part of the way to `gates_of(keep, config)`: units close one by one, the lowest scores first.

    The number closed is linear in `fraction`, and a unit once closed stays closed for every larger fraction.

    Args:
        keep: axis -> indices, shared [k] or local [L, k], in the coordinates of this model.
        scores: axis -> importance, shared [n] or local [L, n], at least for every axis that `keep` cuts.
        config: the model's config.
        fraction: 0 (all open) to 1 (equal to `gates_of`).

    Returns:
        axis -> float32 gates of 0 and 1, shared [n] or local [L, n], for the axes of `keep`.

    Raises:
        AntgmmError: for a fraction outside 0..1, or a cut axis without finite scores of its shape.
    """
    if not 0 <= fraction <= 1:
        raise AntgmmError(f"fraction {fraction} of the way to closed gates: expected 0 to 1")
    final = gates_of(keep, config)
    return {axis: _close(axis, gate, scores, fraction) if (gate == 0).any() else gate for axis, gate in final.items()}


def _close(axis: str, final: np.ndarray, scores: Mapping[str, np.ndarray], fraction: float) -> np.ndarray:
    score = scores_for(axis, scores, final.shape)
    # Kept units rank last; a stable sort makes the order, and so the set closed so far, independent of `fraction`.
    order = np.argsort(np.where(final == 1, np.inf, score), axis=-1, kind="stable")
    rank = np.argsort(order, axis=-1, kind="stable")
    closed = np.floor((final == 0).sum(axis=-1, keepdims=True) * fraction + 1e-6)
    return np.where(rank < closed, 0.0, 1.0).astype(np.float32)
