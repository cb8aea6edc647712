"""Sharding of arrays by their axis names, on the mesh set with `jax.set_mesh`.

Without a mesh, arrays stay as they are and everything runs on one device.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from antgmm_jax.errors import AntgmmError

MESH = ("data", "fsdp", "tensor")
"""Axes of the mesh; the devices of a `tensor` group are neighbours."""

RULES = {
    "batch": ("data", "fsdp"),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "cross_heads": ("tensor",),
    "mlp": ("tensor",),
    "deepstack_mlp": ("tensor",),
    "text_mlp": ("tensor",),
    "vocab": ("tensor",),
}
"""Axis name without its tower -> mesh axes over which it is split; other axes are replicated."""

_LOG = logging.getLogger(__name__)
_warned: set[str] = set()


def make_mesh(*, data: int = 1, fsdp: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """Creates a mesh for `jax.set_mesh`.

    Args:
        data: copies of the model, each with its own rows of a batch.
        fsdp: devices over which widths are split; each has its own rows of a batch too.
        tensor: devices over which heads, hidden units and vocabulary are split.
        devices: devices to use, for example those of a machine that is only compiled for; JAX's by default.

    Returns:
        The mesh; it uses the first devices if there are more.

    Raises:
        AntgmmError: too few devices, several processes with a mesh that does not use all devices, or one that the links
            of a TPU slice do not fit.
    """
    shape, processes = (data, fsdp, tensor), jax.process_count()
    devices = jax.devices() if devices is None else devices
    wanted = ",".join(f"{axis}={size}" for axis, size in zip(MESH, shape, strict=True))
    if math.prod(shape) > len(devices) or (processes > 1 and math.prod(shape) < len(devices)):
        most = "at most" if processes == 1 else f"exactly, as {processes} processes must use all,"
        there = f"there are {len(devices)} ({devices[0].device_kind})"
        raise AntgmmError(
            f"mesh {wanted} needs {math.prod(shape)} devices: {there}:"
            f" choose sizes with a product of {most} {len(devices)}"
        )
    # `jax.make_mesh` allows axes over a part of a torus's axis on v5e alone, and refuses 9 of 15 meshes of a v6e slice.
    used = devices[: math.prod(shape)]
    # GPUs of several machines have numbers of slices too: those of machines or of what NVLink joins.
    if used[0].platform == "tpu" and len({getattr(device, "slice_index", 0) for device in used}) > 1:
        raise AntgmmError(f"mesh {wanted} has devices of several TPU slices, which are not supported: use one slice")
    try:
        grid = mesh_utils.create_device_mesh(shape, used, allow_split_physical_axes=True)
    except NotImplementedError as error:
        raise AntgmmError(f"mesh {wanted} does not fit the links of {devices[0].device_kind}: {error}") from error
    return Mesh(grid, MESH, axis_types=(AxisType.Auto,) * len(MESH))


def active() -> bool:
    """Whether a mesh is set."""
    return not jax.sharding.get_abstract_mesh().empty


def platform() -> str:
    """Platform of the programs traced now: that of the mesh, even if its devices are elsewhere, or JAX's own."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def without_mesh() -> AbstractContextManager:
    """A context without the mesh: this process computes on its own first device."""
    # Not without need: JAX compiles everything again under `set_mesh(None)`, even if no mesh was set before.
    return jax.set_mesh(None) if active() else nullcontext()


def replicated() -> Sharding:
    """Sharding that replicates an array over the mesh; on the first device if there is no mesh."""
    mesh = jax.sharding.get_mesh()
    return NamedSharding(mesh, PartitionSpec()) if active() else jax.sharding.SingleDeviceSharding(jax.devices()[0])


def spec(names: Sequence[str], shape: Sequence[int]) -> PartitionSpec:
    """Returns how an array is split over the mesh.

    An axis with a size that is not divisible stays whole; a warning says so once per axis.

    Args:
        names: axis names; axes after the last name stay whole.
        shape: shape of the array.

    Returns:
        A spec with one entry per name.
    """
    sizes, free, parts = jax.sharding.get_abstract_mesh().shape, set(MESH), []
    for name, size in zip(names, shape, strict=False):
        over = RULES.get(name.rpartition("/")[2], ())
        count = math.prod(sizes[axis] for axis in over)
        # If two axes have the same rule, such as the two widths of a projection, the first is split.
        if count == 1 or not free.issuperset(over):
            parts.append(None)
        elif size % count:
            _warn_replicated(name, size, " x ".join(over), count)
            parts.append(None)
        else:
            parts.append(over)
            free -= {*over}
    return PartitionSpec(*parts)


def _warn_replicated(name: str, size: int, over: str, count: int) -> None:
    if name not in _warned and jax.process_index() == 0:
        _LOG.warning("%s = %d is not divisible by %s = %d: it is replicated on every device", name, size, over, count)
    _warned.add(name)


def place(leaf: Any, names: Sequence[str]) -> Any:
    """Shards an array over the mesh by its axis names.

    Args:
        leaf: a `jax.Array`, possibly traced; a NumPy array that every process holds whole; or a `jax.ShapeDtypeStruct`,
            which gets the sharding.
        names: axis names.

    Returns:
        The sharded array; `leaf` itself without a mesh.
    """
    if not active():
        return leaf
    where = spec(names, leaf.shape)
    if isinstance(leaf, Tracer) or (isinstance(leaf, jax.Array) and isinstance(leaf.sharding, NamedSharding)):
        return jax.lax.with_sharding_constraint(leaf, where)
    sharding = NamedSharding(jax.sharding.get_mesh(), where)
    if isinstance(leaf, jax.Array):
        return jax.device_put(leaf, sharding)
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])


def place_tree(tree: Any, axes: Any) -> Any:
    """Shards every leaf of a tree by `place`; `axes` is a tree of tuples of axis names."""
    return jax.tree.map(place, tree, axes) if active() else tree


def splits_widths() -> bool:
    """Whether the mesh splits widths, so that parameters must be gathered before use."""
    return active() and jax.sharding.get_abstract_mesh().shape["fsdp"] > 1


def gathered(leaf: Any, names: Sequence[str]) -> Any:
    """Gathers a parameter over the mesh axis `fsdp`, just before its use; its gradient is split again.

    Without this the partitioner splits the products along the split width: each device then multiplies narrow slices,
    on a TPU at a fifth of its rate.

    Args:
        leaf: traced parameter.
        names: axis names.

    Returns:
        The parameter, split over `tensor` only; `leaf` itself if no width is split.
    """
    if not splits_widths():
        return leaf
    split = spec(names, leaf.shape)
    whole = PartitionSpec(*(None if part and "fsdp" in part else part for part in split))
    return leaf if split == whole else _resharded(leaf, whole, split)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _resharded(leaf: jax.Array, here: PartitionSpec, back: PartitionSpec) -> jax.Array:
    """Reshards an array to `here`, and its gradient to `back`."""
    return jax.lax.with_sharding_constraint(leaf, here)


def _resharded_backward(here: PartitionSpec, back: PartitionSpec, _: None, gradient: jax.Array) -> tuple[jax.Array]:
    # First whole, then split: otherwise the partitioner computes the product in as many pieces as there are devices. On
    # a v5e, 2048 x 4096 times 2048 x 8192 in 16 pieces takes 2.57 ms by the compiler's estimate, and 0.74 at once.
    return (jax.lax.with_sharding_constraint(jax.lax.with_sharding_constraint(gradient, here), back),)


_resharded.defvjp(lambda leaf, here, back: (jax.lax.with_sharding_constraint(leaf, here), None), _resharded_backward)


def shard_rows(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Puts a host batch on the devices and splits its rows over them.

    Args:
        batch: tree of arrays with equal numbers of rows; under a mesh, the rows that `local_rows` returns.

    Returns:
        The global batch; each process holds its part.
    """
    if not active():
        return jax.device_put(dict(batch))
    sharding = NamedSharding(jax.sharding.get_mesh(), PartitionSpec(RULES["batch"]))
    return jax.tree.map(lambda value: jax.make_array_from_process_local_data(sharding, value), dict(batch))


def local_rows(size: int) -> np.ndarray:
    """Returns the rows of a batch that this process reads, for its own devices.

    Args:
        size: rows of the whole batch.

    Returns:
        Row numbers, ascending.

    Raises:
        AntgmmError: the batch is not divisible by the number of devices over which rows are split.
    """
    if not active():
        return np.arange(size)
    if padded_batch_size(size) != size:
        over = " x ".join(RULES["batch"])
        raise AntgmmError(
            f"a batch of {size} rows is not divisible by {over} = {padded_batch_size(1)}: use a multiple of it"
        )
    sharding = NamedSharding(jax.sharding.get_mesh(), PartitionSpec(RULES["batch"]))
    rows, parts = np.arange(size), sharding.addressable_devices_indices_map((size,)).values()
    return np.unique(np.concatenate([rows[part] for part in parts]))


def model_parts() -> int:
    """Returns the number of devices over which the parameters of a model are split; 1 without a mesh."""
    if not active():
        return 1
    return math.prod(size for axis, size in jax.sharding.get_abstract_mesh().shape.items() if axis != "data")


def devices() -> int:
    """Returns the number of devices of the mesh; 1 without one."""
    return math.prod(jax.sharding.get_abstract_mesh().shape.values()) if active() else 1


def padded_batch_size(size: int) -> int:
    """Rounds a batch size up to a multiple of the number of devices over which rows are split."""
    if not active():
        return size
    count = math.prod(jax.sharding.get_abstract_mesh().shape[axis] for axis in RULES["batch"])
    return -(-size // count) * count
