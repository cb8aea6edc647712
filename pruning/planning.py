"""Chooses the units to keep from scores and target sizes, and checks sizes against the family's constraints."""

import difflib
from collections.abc import Iterable, Mapping

import numpy as np

from antgmm_jax.axes import resize, sizes
from antgmm_jax.config import LMMConfig, on_image_side
from antgmm_jax.errors import AntgmmError
from antgmm_jax.families import complete, family, violations
from antgmm_jax.pure import local_axes
from pruning.importance import scores_for
from pruning.keep import Keep, gate_shape


def plan(
    scores: Mapping[str, np.ndarray], config: LMMConfig, targets: Mapping[str, int | float]
) -> dict[str, np.ndarray]:
    """Chooses the units to keep: the best ones by score.

    Axes tied to the targets are pruned too, by their own scores: only sizes are tied. If not every set of layers is
    legal (cross-attention in every second layer), the family chooses the best legal set.

    Args:
        scores: axis -> importance, [n] for a shared axis or [L, n] for a local one, for every pruned axis (tied axes
            too).
        config: model config.
        targets: axis -> number of units to keep (int), or the fraction to keep (float: 1 is one unit, 1.0 is all).

    Returns:
        axis -> ascending int32 indices, [k] or [L, k], for the targets and the axes tied to them.

    Raises:
        AntgmmError: an unknown axis, a size above the current one, an illegal size (names the nearest legal ones), or a
            pruned axis without valid scores.
    """
    present, local = sizes(config), local_axes(config)
    wanted = {axis: size_of(axis, target, present) for axis, target in targets.items()}
    reason = illegal_reason(config, wanted)
    if reason:
        raise AntgmmError(explain_illegal(config, wanted, reason))
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


def check_scores(scores: Mapping[str, np.ndarray], keep: Keep) -> None:
    """Checks that the scores of every axis that a plan cuts are not all 0, as those of units that no row reaches.

    Args:
        scores: as in `plan`.
        keep: result of `plan` for the axes to check; those that are tied to them may have no scores.

    Raises:
        AntgmmError: all scores of an axis are 0, so that its first units would be kept.
    """
    for axis, kept in keep.items():
        if axis in scores and kept.shape[-1] < scores[axis].shape[-1] and not scores[axis].any():
            rows = "more calibration rows" + (", some with images" if on_image_side(axis) else "")
            raise AntgmmError(
                f"{axis}: all importance scores are 0, so its first units would be kept: use {rows}, or another"
                " importance"
            )


def size_of(axis: str, target: int | float, present: Mapping[str, int]) -> int:
    """Converts a target to a number of units.

    Args:
        axis: axis name.
        target: number of units to keep, or (float) the fraction to keep.
        present: axis -> current size.

    Returns:
        A number from 1 to the current size.

    Raises:
        AntgmmError: an unknown axis, or a number outside this range.
    """
    if axis not in present:
        near = difflib.get_close_matches(axis, present, n=1, cutoff=0.0)
        raise AntgmmError(f"unknown axis {axis!r}: did you mean {near[0]!r}? This model has {', '.join(present)}")
    count = round(target * present[axis]) if isinstance(target, float) else int(target)
    if count > present[axis]:
        raise AntgmmError(
            f"{axis} = {target} would enlarge the axis: it has {present[axis]} units; choose at most that"
        )
    if count < 1:
        raise AntgmmError(f"{axis} = {target} keeps none of the {present[axis]} units; choose at least 1")
    return count


def _top(score: np.ndarray, count: int) -> np.ndarray:
    """Ascending indices of the largest scores of each row; the first units win ties."""
    best = np.argsort(-score, axis=-1, kind="stable")[..., :count]
    return np.sort(best, axis=-1).astype(np.int32)


def variants(config: LMMConfig, full: Mapping[str, int]) -> list[LMMConfig]:
    """Returns the configs that pruning to these sizes may result in; scores decide between several."""
    return family(config).depth.variants(config, resize(config, full))


def legal_variants(config: LMMConfig, full: Mapping[str, int]) -> list[LMMConfig]:
    """Returns the legal configs among `variants`."""
    return [variant for variant in variants(config, full) if not violations(variant)]


def illegal_reason(config: LMMConfig, wanted: Mapping[str, int]) -> str:
    """Returns the reason why no legal model has these sizes; empty if one has."""
    try:
        reasons = [violations(variant) for variant in variants(config, complete(config, wanted))]
    except AntgmmError as error:
        return str(error)
    return "; ".join(reasons[0]) if all(reasons) else ""


def explain_illegal(config: LMMConfig, wanted: Mapping[str, int], reason: str) -> str:
    """Returns an error message for illegal sizes, with the nearest legal sizes of the axes that could be changed."""
    hints = [_nearest(config, wanted, axis) for axis in wanted]
    if not any(hints):
        hints = [
            _nearest(config, {axis: wanted[axis]}, axis)
            for axis in wanted
            if illegal_reason(config, {axis: wanted[axis]})
        ]
    sizes_text = ", ".join(f"{axis} = {count}" for axis, count in wanted.items())
    return f"{sizes_text} is not legal: {reason}; nearest legal sizes: {'; '.join(filter(None, hints)) or 'none'}"


def _nearest(config: LMMConfig, wanted: Mapping[str, int], axis: str) -> str:
    def first(candidates: Iterable[int]) -> list[int]:
        return [n for n in candidates if not illegal_reason(config, {**wanted, axis: n})][:1]

    below = first(range(wanted[axis] - 1, 0, -1))
    above = first(range(wanted[axis] + 1, sizes(config)[axis] + 1))
    return f"{axis} {' or '.join(str(n) for n in below + above)}" if below + above else ""
