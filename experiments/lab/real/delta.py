"""What a training changed, as a small file: low-rank factors of linear maps, and whole tensors where more changed."""

from collections.abc import Iterable, Iterator, Mapping

import ml_dtypes
import numpy as np

A, B = ".a", ".b"
"""Suffixes of the two factors of a tensor's change."""
NOISE = 1e-4
"""Singular values below this part of the largest one are rounding."""
LOST = 0.02
"""Largest part of a change, in squares, that factors may leave out: two trainings with adapters add their ranks."""


def extract(
    before: Iterable[tuple[str, np.ndarray]], after: Mapping[str, np.ndarray], rank: int
) -> dict[str, np.ndarray]:
    """Returns the difference of two checkpoints of one shape.

    Args:
        before: tensors by name, float32.
        after: the same tensors after training.
        rank: matrices of which this rank holds all but `LOST` of the change are stored as two factors.

    Returns:
        Tensors in bfloat16: `NAME.a` [out, k] and `NAME.b` [k, in] of the matrices that changed by a product of rank
        k, and `NAME`, the new values, of other tensors that changed.
    """
    result = {}
    for name, old in before:
        new = np.asarray(after[name], np.float32)
        change = new - np.asarray(old, np.float32)
        if not change.any():
            continue
        factors = _factors(change, rank) if change.ndim == 2 else None
        stored = {name: new} if factors is None else {name + A: factors[0], name + B: factors[1]}
        result |= {key: np.ascontiguousarray(value, ml_dtypes.bfloat16) for key, value in stored.items()}
    return result


def _factors(change: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Factors of a matrix of at most the given rank, with equal norms; None if they would lose too much."""
    left, values, right = np.linalg.svd(change, full_matrices=False)
    kept = min(rank, int((values > NOISE * values[0]).sum()))
    if (values[kept:] ** 2).sum() > LOST * (values**2).sum():
        return None
    roots = np.sqrt(values[:kept])
    return left[:, :kept] * roots, roots[:, None] * right[:kept]


def applied(
    before: Iterable[tuple[str, np.ndarray]], delta: Mapping[str, np.ndarray]
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the tensors of a checkpoint after a training.

    Args:
        before: tensors by name, float32.
        delta: from `extract`.
    """
    for name, old in before:
        if name in delta:
            yield name, delta[name].astype(np.float32)
        elif name + A in delta:
            yield name, old + delta[name + A].astype(np.float32) @ delta[name + B].astype(np.float32)
        else:
            yield name, old
