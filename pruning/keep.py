"""Kept units as index sets: validation, the resulting config, composition, and merging of several runs."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from antgmm_jax.axes import resize, sizes
from antgmm_jax.config import LMMConfig
from antgmm_jax.errors import AntgmmError
from antgmm_jax.families import family, violations
from antgmm_jax.pure import local_axes

Keep = Mapping[str, np.ndarray]
"""axis -> kept units: int32 indices, or for a width a float32 basis [n, k] (`pruning.principal`)."""


def is_basis(kept: np.ndarray) -> bool:
    """Whether the kept units of an axis are a basis and not indices."""
    return kept.dtype.kind == "f"


def as_kept(values: Any) -> np.ndarray:
    """Converts kept units from nested lists (as in records) to an int32 array of indices or a float32 basis.

    Raises:
        AntgmmError: they are no numbers, or no indices.
    """
    try:
        kept = np.asarray(values)
    except ValueError:  # lists of several lengths
        kept = np.empty(0, object)
    if is_basis(kept):
        return kept.astype(np.float32)
    if kept.dtype.kind not in "iu" or kept.min(initial=0) < -1 or kept.max(initial=0) > np.iinfo(np.int32).max:
        raise AntgmmError("kept units are no lists of indices: choose another stage")
    return kept.astype(np.int32)


def depth_axis(axis: str) -> str:
    """Returns the layers axis of the same tower: "vision/mlp" -> "vision/layers"."""
    return axis.split("/")[0] + "/layers"


def gate_shape(axis: str, present: Mapping[str, int], local: Collection[str]) -> tuple[int, ...]:
    """Returns the shape of the gates and scores of an axis.

    Args:
        axis: axis name.
        present: axis -> size.
        local: axes with one row per layer.

    Returns:
        (n,) for a shared axis, (L, n) for a local one.
    """
    return (present[depth_axis(axis)], present[axis]) if axis in local else (present[axis],)


def identity(config: LMMConfig) -> dict[str, np.ndarray]:
    """Returns the indices of all units of every axis.

    Args:
        config: model config.

    Returns:
        axis -> int32 indices, [n] for a shared axis or [L, n] for a local one.
    """
    present, local = sizes(config), local_axes(config)
    indices = {axis: np.arange(size, dtype=np.int32) for axis, size in present.items()}
    return {
        axis: np.tile(index, (present[depth_axis(axis)], 1)) if axis in local else index
        for axis, index in indices.items()
    }


def check(config: LMMConfig, keep: Keep) -> None:
    """Checks that kept units fit a model.

    Args:
        config: model config.
        keep: axis -> ascending indices, [k] for a shared axis, or [L, k] for a local one with one row per layer of this
            model (rows of -1 for layers that `keep` removes); or a basis [n, k] of a width.

    Raises:
        AntgmmError: names the axis, the error, and what was expected.
    """
    present, local = sizes(config), local_axes(config)
    for axis, index in keep.items():
        if axis not in present:
            raise AntgmmError(f"unknown axis {axis!r}: this model has {', '.join(sorted(present))}")
        if is_basis(index):
            size = present[axis]
            if not axis.endswith("/embed") or index.ndim != 2 or len(index) != size or not 1 <= index.shape[1] <= size:
                raise AntgmmError(
                    f"{axis}: a basis of shape {index.shape}, expected [{size}, k]; compute it with principal"
                )
            continue
        if axis in local:
            depth = depth_axis(axis)
            _check_local(axis, index, present[depth], keep.get(depth, np.arange(present[depth])))
        elif index.ndim != 1:
            raise AntgmmError(f"{axis}: indices have shape {index.shape}, but the axis is shared: expected [k]")
        rows = np.atleast_2d(index)
        rows = rows[(rows >= 0).any(axis=1)]
        if rows.size == 0 or rows.min() < 0 or rows.max() >= present[axis] or (np.diff(rows, axis=1) <= 0).any():
            raise AntgmmError(
                f"{axis}: indices must ascend strictly within 0..{present[axis] - 1}, and keep at least one"
            )


def _check_local(axis: str, index: np.ndarray, depth: int, used: np.ndarray) -> None:
    if index.ndim != 2 or len(index) != depth:
        raise AntgmmError(f"{axis}: indices have shape {index.shape}, expected one row for each of {depth} layers")
    missing = [int(layer) for layer in used if (index[layer] < 0).any()]
    if missing:
        raise AntgmmError(
            f"{axis}: no indices for the kept layers {missing} of {depth_axis(axis)}; choose other layers"
        )


def shrunk_config(config: LMMConfig, keep: Keep) -> LMMConfig:
    """Returns the config of a pruned model.

    Args:
        config: model config before pruning.
        keep: kept units as in `check`; other axes are not pruned.

    Returns:
        Config with the new sizes, adjusted to the kept layers. A basis of the text width unties the head: only a head
        of its own can absorb the scales of the last norm.

    Raises:
        AntgmmError: `keep` does not fit the model, or no config of the family describes the kept layers.
    """
    check(config, keep)
    if "text/embed" in keep and is_basis(keep["text/embed"]):
        config = untied(config)
    smaller = resize(config, {axis: int(index.shape[-1]) for axis, index in keep.items()})
    return family(config).depth.reindex(config, smaller, keep)


def untied(config: LMMConfig) -> LMMConfig:
    """Returns the config of the same model with a head of its own that contains its factor width ** -0.5, if any."""
    return replace(config, language=replace(config.language, tied=False, scaled_head=False))


def compose(parent: Keep, keep: Keep) -> dict[str, np.ndarray]:
    """Composes two prunings: returns the kept units as indices of the original model (the teacher).

    Args:
        parent: kept units of every axis, as indices of the teacher: `identity` or an earlier result.
        keep: units kept by the second pruning, as indices of the model after `parent`; other axes are not pruned.

    Returns:
        axis -> kept units of the teacher, for every axis. On a local axis, rows of removed layers
        have no meaning (-1, or an old row), and nothing reads them.

    Raises:
        AntgmmError: an axis that `parent` lacks, or a basis of an axis that `parent` has pruned by index.
    """
    if unknown := sorted(set(keep) - set(parent)):
        raise AntgmmError(f"compose: parent lacks the axes {', '.join(unknown)}; start from identity(config)")
    result = dict(parent)
    for axis, index in keep.items():
        known = parent[axis]
        if is_basis(known):
            result[axis] = known @ index if is_basis(index) else known[:, index]
        elif is_basis(index):
            if not np.array_equal(known, np.arange(len(index))):
                raise AntgmmError(
                    f"{axis}: channels were pruned by index before this basis; prune the axis to components first"
                )
            result[axis] = index
        elif known.ndim == 1:
            result[axis] = known[index].astype(np.int32)
        elif index.shape[1] < known.shape[1]:
            layers = parent[depth_axis(axis)]
            rows = np.full((len(known), index.shape[1]), -1, np.int32)
            rows[layers] = np.where(index < 0, -1, np.take_along_axis(known[layers], np.maximum(index, 0), axis=1))
            result[axis] = rows
    return result


def merge(*keeps: Keep, config: LMMConfig, names: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """Merges the kept units of several runs with the same teacher; each axis may be pruned in one run only.

    Args:
        *keeps: kept units as indices of the teacher; an axis is not pruned if it is missing or complete.
        config: config of the teacher.
        names: names of the runs for error messages; "source 1", ... by default.

    Returns:
        axis -> kept units of the teacher, for every axis.

    Raises:
        AntgmmError: an axis is pruned in two runs, a kept layer has no indices on a local axis, or the sizes do not
            form a legal model.
    """
    labels = [*names, *(f"source {n}" for n in range(len(names) + 1, len(keeps) + 1))]
    whole = identity(config)
    result, owner = dict(whole), {}
    for name, keep in zip(labels, keeps, strict=True):
        for axis, index in keep.items():
            if axis in whole and np.array_equal(index, whole[axis]):
                continue
            if axis in owner:
                raise AntgmmError(f"{axis} is pruned in both {owner[axis]} and {name}; take it from one of them")
            owner[axis], result[axis] = name, as_kept(index)
    if reasons := violations(shrunk_config(config, result)):
        raise AntgmmError(f"the merged sizes are not a legal model: {'; '.join(reasons)}")
    return result
