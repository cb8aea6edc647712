"""Where arrays lie on a mesh of devices: by the names of their axes, on the mesh that JAX holds (`jax.set_mesh`).

Without such a mesh arrays stay as they are, and programs are those of one device.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from antgmm_jax.errors import AntgmmError

MESH = ("data", "fsdp", "tensor")
"""Axes of a mesh; the devices of one `tensor` group are neighbours."""

RULES = {
    "batch": ("data", "fsdp"),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "cross_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
}
"""Axis, without its tower -> mesh axes that it is split over; one that is not named here lies whole on every device."""

_LOG = logging.getLogger(__name__)
_told: set[str] = set()


def make_mesh(*, data: int = 1, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """A mesh for `jax.set_mesh`.

    Args:
        data: copies of the model, each with its own rows of a batch.
        fsdp: devices that a copy's widths are split over; they have their own rows too.
        tensor: devices that its heads, hidden units and vocabulary are split over.

    Returns:
        The mesh, of the first devices where there are more.

    Raises:
        AntgmmError: too few devices, or a mesh of several processes that leaves some out.
    """
    shape, found, processes = (data, fsdp, tensor), jax.devices(), jax.process_count()
    if math.prod(shape) > len(found) or (processes > 1 and math.prod(shape) < len(found)):
        asked = ",".join(f"{axis}={size}" for axis, size in zip(MESH, shape, strict=True))
        every = f", which {processes} processes have to use all" if processes > 1 else ""
        raise AntgmmError(
            f"mesh {asked} needs {math.prod(shape)} devices: there are {len(found)} ({found[0].device_kind}){every}"
        )
    return jax.make_mesh(shape, MESH, axis_types=(AxisType.Auto,) * len(MESH))


def active() -> bool:
    """Whether there is a mesh."""
    return not jax.sharding.get_abstract_mesh().empty


def alone() -> AbstractContextManager:
    """Outside of the mesh: what is computed in here, one process computes by itself, on its first device."""
    # To JAX "no mesh" is not the same as none ever set: it would compile every program once more.
    return jax.set_mesh(None) if active() else nullcontext()


def everywhere() -> Sharding:
    """Whole on every device of the mesh; on the first device where there is none."""
    mesh = jax.sharding.get_mesh()
    return NamedSharding(mesh, PartitionSpec()) if active() else jax.sharding.SingleDeviceSharding(jax.devices()[0])


def spec(names: Sequence[str], shape: Sequence[int]) -> PartitionSpec:
    """How an array is split over the mesh. A size that does not divide is left whole; this is told once an axis.

    Args:
        names: of its axes; those after the last name are left whole.
        shape: its shape.

    Returns:
        A part for each name.
    """
    sizes, free, parts = jax.sharding.get_abstract_mesh().shape, set(MESH), []
    for name, size in zip(names, shape, strict=False):
        over = RULES.get(name.rpartition("/")[2], ())
        count = math.prod(sizes[axis] for axis in over)
        # Of two axes with one rule, such as the widths that a projection joins, the first is split.
        if count == 1 or not free.issuperset(over):
            parts.append(None)
        elif size % count:
            _tell_whole(name, size, " x ".join(over), count)
            parts.append(None)
        else:
            parts.append(over)
            free -= {*over}
    return PartitionSpec(*parts)


def _tell_whole(name: str, size: int, over: str, count: int) -> None:
    if name not in _told and jax.process_index() == 0:
        _LOG.warning("%s = %d does not divide by %s = %d: it lies whole on every device", name, size, over, count)
    _told.add(name)


def place(leaf: Any, names: Sequence[str]) -> Any:
    """An array where the rules put it.

    Args:
        leaf: a `jax.Array`, also a traced one; a numpy array that every process has whole; or a
            `jax.ShapeDtypeStruct`, which then says where its array is to lie.
        names: of its axes.

    Returns:
        The same on the mesh; unchanged where there is none.
    """
    if not active():
        return leaf
    where = spec(names, leaf.shape)
    if isinstance(leaf, jax.Array):
        return jax.lax.with_sharding_constraint(leaf, where)
    sharding = NamedSharding(jax.sharding.get_mesh(), where)
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])


def lay(tree: Any, axes: Any) -> Any:
    """`place` for each leaf of a tree; `axes` has a tuple of names in the place of each."""
    return jax.tree.map(place, tree, axes) if active() else tree


def rows(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A host batch on the devices, its rows split over them.

    Args:
        batch: a tree of arrays of the same rows; under a mesh those that `own_rows` named.

    Returns:
        The whole batch, of which each process has its part.
    """
    if not active():
        return jax.device_put(dict(batch))
    sharding = NamedSharding(jax.sharding.get_mesh(), PartitionSpec(RULES["batch"]))
    return jax.tree.map(lambda value: jax.make_array_from_process_local_data(sharding, value), dict(batch))


def own_rows(size: int) -> np.ndarray:
    """Which rows of a batch this process has to read: those of its own devices.

    Args:
        size: rows of the batch.

    Returns:
        Row numbers, ascending.

    Raises:
        AntgmmError: the batch does not divide by the devices that it is split over.
    """
    if not active():
        return np.arange(size)
    if whole_rows(size) != size:
        over = " x ".join(RULES["batch"])
        raise AntgmmError(f"a batch of {size} rows does not divide by {over} = {whole_rows(1)}: give a multiple of it")
    sharding = NamedSharding(jax.sharding.get_mesh(), PartitionSpec(RULES["batch"]))
    rows, parts = np.arange(size), sharding.addressable_devices_indices_map((size,)).values()
    return np.unique(np.concatenate([rows[part] for part in parts]))


def whole_rows(size: int) -> int:
    """The smallest batch of at least `size` rows that divides by the devices that rows are split over."""
    if not active():
        return size
    count = math.prod(jax.sharding.get_abstract_mesh().shape[axis] for axis in RULES["batch"])
    return -(-size // count) * count
