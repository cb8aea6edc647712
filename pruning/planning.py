"""From scores and target sizes to the units that stay, under the shapes that a family can serve."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping

import numpy as np

from antgmm_jax.axes import resize, sizes
from antgmm_jax.config import LMMConfig
from antgmm_jax.errors import AntgmmError
from antgmm_jax.families import complete, family, violations
from antgmm_jax.pure import local_axes
from pruning.importance import scores_for
from pruning.keep import gate_shape


def plan(
    scores: Mapping[str, np.ndarray], config: LMMConfig, targets: Mapping[str, int | float]
) -> dict[str, np.ndarray]:
    """Which units stay: the best by score, at sizes that the family can serve.

    Axes tied to the stated ones are cut along with them, by their own scores: counts are tied, indices are free. Where
    not any layers may stay together (cross-attention at every second one), the family chooses among those that may.

    Args:
        scores: axis -> importance, shared [n] or local [L, n], for every axis that gets smaller.
        config: the model that is cut.
        targets: axis -> number of units to keep, or (a float) the fraction of the present size to keep.

    Returns:
        axis -> int32 indices sorted ascending, shared [k] or local [L, k], for the stated axes and those tied to them.

    Raises:
        AntgmmError: for an unknown axis (naming the nearest), a size that would grow an axis, a size that no legal
            model has (naming the nearest legal ones), or an axis to be cut that has no usable scores.
    """
    present, local = sizes(config), local_axes(config)
    wanted = {axis: size_of(axis, target, present) for axis, target in targets.items()}
    fault = fault_of(config, wanted)
    if fault:
        raise AntgmmError(advice(config, wanted, fault))
    full = complete(config, wanted)
    keep = {}
    for axis in sorted(full):
        if axis not in wanted and full[axis] == present[axis]:
            continue
        shape = gate_shape(axis, present, local)
        if full[axis] == present[axis]:
            keep[axis] = np.broadcast_to(np.arange(present[axis], dtype=np.int32), shape).copy()
        else:
            score = scores_for(axis, scores, shape)
            chosen = family(config).depth.choose(config, axis, score, legal_variants(config, full))
            keep[axis] = _top(score, full[axis]) if chosen is None else chosen
    return keep


def size_of(axis: str, target: int | float, present: Mapping[str, int]) -> int:
    """The number of units that a target asks for.

    Args:
        axis: the axis.
        target: units to keep, or (a float) the fraction of the present size.
        present: axis -> size of the model that is cut.

    Returns:
        A count from 1 to the present size.

    Raises:
        AntgmmError: for an unknown axis (naming the nearest), or a count outside that range.
    """
    if axis not in present:
        near = difflib.get_close_matches(axis, present, n=1, cutoff=0.0)
        raise AntgmmError(f"unknown axis {axis!r}: did you mean {near[0]!r}? This model has {', '.join(present)}")
    count = round(target * present[axis]) if isinstance(target, float) else int(target)
    if count > present[axis]:
        raise AntgmmError(f"{axis} = {target} would grow the axis: it has {present[axis]} units; ask for at most that")
    if count < 1:
        raise AntgmmError(f"{axis} = {target} leaves no unit of {present[axis]}; ask for at least 1")
    return count


def _top(score: np.ndarray, count: int) -> np.ndarray:
    """Indices of the largest scores of each row, ascending; of equal scores the first units stay."""
    best = np.argsort(-score, axis=-1, kind="stable")[..., :count]
    return np.sort(best, axis=-1).astype(np.int32)


def variants(config: LMMConfig, full: Mapping[str, int]) -> list[LMMConfig]:
    """The configs that a cut to sizes may leave: more than one where scores decide between patterns of layers."""
    return family(config).depth.variants(config, resize(config, full))


def legal_variants(config: LMMConfig, full: Mapping[str, int]) -> list[LMMConfig]:
    """Those of `variants` that the family serves."""
    return [variant for variant in variants(config, full) if not violations(variant)]


def fault_of(config: LMMConfig, wanted: Mapping[str, int]) -> str:
    """Why no legal model has these sizes; empty where one has."""
    try:
        found = [violations(variant) for variant in variants(config, complete(config, wanted))]
    except AntgmmError as error:
        return str(error)
    return "; ".join(found[0]) if all(found) else ""


def advice(config: LMMConfig, wanted: Mapping[str, int], fault: str) -> str:
    """The fault, and the nearest legal sizes of each axis that alone could mend it (else of each that is at fault)."""
    hints = [_nearest(config, wanted, axis) for axis in wanted]
    if not any(hints):
        hints = [
            _nearest(config, {axis: wanted[axis]}, axis) for axis in wanted if fault_of(config, {axis: wanted[axis]})
        ]
    asked = ", ".join(f"{axis} = {count}" for axis, count in wanted.items())
    return f"{asked} cannot be served: {fault}; nearest legal sizes: {'; '.join(filter(None, hints)) or 'none'}"


def _nearest(config: LMMConfig, wanted: Mapping[str, int], axis: str) -> str:
    def first(candidates: Iterable[int]) -> list[int]:
        return [n for n in candidates if not fault_of(config, {**wanted, axis: n})][:1]

    below = first(range(wanted[axis] - 1, 0, -1))
    above = first(range(wanted[axis] + 1, sizes(config)[axis] + 1))
    return f"{axis} {' or '.join(str(n) for n in below + above)}" if below + above else ""
