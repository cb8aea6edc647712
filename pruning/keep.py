"""Which units a model keeps: index sets, the config they lead to, composition, and recombination of several runs."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from antgmm_jax.axes import resize, sizes
from antgmm_jax.config import LMMConfig
from antgmm_jax.errors import AntgmmError
from antgmm_jax.families import family, violations
from antgmm_jax.pure import local_axes

Keep = Mapping[str, np.ndarray]
"""axis -> what stays: int32 indices, or float32 [n, k], a basis of a width (`pruning.principal`)."""


def is_basis(kept: np.ndarray) -> bool:
    """Whether an axis is kept as a basis, not as indices.

    Args:
        kept: its entry in a keep.

    Returns:
        Whether it is.
    """
    return kept.dtype.kind == "f"


def as_kept(values: Any) -> np.ndarray:
    """An entry of a keep as a record holds it, as an array again.

    Args:
        values: nested lists.

    Returns:
        int32 indices, or a float32 basis.
    """
    kept = np.asarray(values)
    return kept.astype(np.float32 if is_basis(kept) else np.int32)


def depth_axis(axis: str) -> str:
    """The layers axis of an axis's tower.

    Args:
        axis: an axis name, such as "vision/mlp".

    Returns:
        Its tower's layers axis, such as "vision/layers".
    """
    return axis.split("/")[0] + "/layers"


def gate_shape(axis: str, present: Mapping[str, int], local: Collection[str]) -> tuple[int, ...]:
    """The shape of an axis's gates and scores.

    Args:
        axis: an axis name.
        present: axis -> size.
        local: the axes with one row a layer.

    Returns:
        (n,) for a shared axis, (L, n) for a local one.
    """
    return (present[depth_axis(axis)], present[axis]) if axis in local else (present[axis],)


def identity(config: LMMConfig) -> dict[str, np.ndarray]:
    """The keep that cuts nothing and holds every axis.

    Args:
        config: the model's config.

    Returns:
        axis -> int32 indices: shared [n], local [L, n].
    """
    present, local = sizes(config), local_axes(config)
    every = {axis: np.arange(size, dtype=np.int32) for axis, size in present.items()}
    return {
        axis: np.tile(all_, (present[depth_axis(axis)], 1)) if axis in local else all_ for axis, all_ in every.items()
    }


def check(config: LMMConfig, keep: Keep) -> None:
    """Refuse a keep that does not describe this model.

    Args:
        config: the model's config.
        keep: axis -> indices sorted ascending; shared [k], local [L, k] with one row for each layer of this model,
            where rows of -1 stand for layers that the same keep drops; or a basis [n, k] of a shared one.

    Raises:
        AntgmmError: naming the axis, what is wrong with it, and what was expected.
    """
    present, local = sizes(config), local_axes(config)
    for axis, index in keep.items():
        if axis not in present:
            raise AntgmmError(f"unknown axis {axis!r}: this model has {', '.join(sorted(present))}")
        if is_basis(index):
            size = present[axis]
            if not axis.endswith("/embed") or index.ndim != 2 or len(index) != size or not 1 <= index.shape[1] <= size:
                raise AntgmmError(
                    f"{axis}: a basis of shape {index.shape}, expected [{size}, k] of a width; take it from principal"
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
        raise AntgmmError(f"{axis}: no row for the kept layers {missing} of {depth_axis(axis)}; choose other layers")


def shrunk_config(config: LMMConfig, keep: Keep) -> LMMConfig:
    """The config of the model that a keep leaves.

    Args:
        config: the config of the model that is cut.
        keep: as in `check`; an axis left out stays whole.

    Returns:
        The config with the kept counts, and what follows from the kept layers.

    Raises:
        AntgmmError: for a keep that does not describe the model, or layers that no config of its family describes.
    """
    check(config, keep)
    smaller = resize(config, {axis: int(index.shape[-1]) for axis, index in keep.items()})
    return family(config).depth.reindex(config, smaller, keep)


def compose(parent: Keep, keep: Keep) -> dict[str, np.ndarray]:
    """Where the units kept by a second cut lie in the model that the first one cut.

    Args:
        parent: a keep of every axis in the coordinates of the teacher, such as `identity` or a former `compose`.
        keep: a keep in the coordinates of the model that `parent` left; an axis left out stays whole.

    Returns:
        A keep of every axis in the teacher's coordinates. A local axis that `keep` cuts has a row for each layer that
        stood when it was cut, also if `keep` drops it, and -1 for layers dropped before.

    Raises:
        AntgmmError: for an axis that `parent` lacks, or a basis of an axis that it has cut by index.
    """
    if unknown := sorted(set(keep) - set(parent)):
        raise AntgmmError(f"compose: the parent keep lacks the axes {', '.join(unknown)}; start from identity(config)")
    result = dict(parent)
    for axis, index in keep.items():
        known = parent[axis]
        if is_basis(known):
            result[axis] = known @ index if is_basis(index) else known[:, index]
        elif is_basis(index):
            if not np.array_equal(known, np.arange(len(index))):
                raise AntgmmError(
                    f"{axis}: a basis of channels of which some were cut before; cut it to components first"
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
    """Recombine runs of one teacher: each axis from the one source that cuts it.

    Args:
        *keeps: keeps in the teacher's coordinates, whole or of some axes; an axis that is absent or equal to the
            identity is not cut there.
        config: the teacher's config.
        names: what to call the sources in errors, such as their stage folders; "source 1", ... where left out.

    Returns:
        A keep of every axis in the teacher's coordinates, to be cut from the teacher's weights.

    Raises:
        AntgmmError: for an axis cut by two sources (naming both), a chosen layer without a row in a local axis (naming
            the layers), or counts that together make no legal model (naming the rule).
    """
    called = [*names, *(f"source {n}" for n in range(len(names) + 1, len(keeps) + 1))]
    whole = identity(config)
    result, source = dict(whole), {}
    for name, keep in zip(called, keeps, strict=True):
        for axis, index in keep.items():
            if axis in whole and np.array_equal(index, whole[axis]):
                continue
            if axis in source:
                raise AntgmmError(f"{axis} is cut in both {source[axis]} and {name}; take it from one of them")
            source[axis], result[axis] = name, as_kept(index)
    if faults := violations(shrunk_config(config, result)):
        raise AntgmmError(f"the merged cuts make no legal model: {'; '.join(faults)}")
    return result
