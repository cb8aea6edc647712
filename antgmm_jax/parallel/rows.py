"""Sums over the rows of a batch, each device over its own rows, with weights that are gathered once or stay split."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array

from antgmm_jax.parallel import sharding

ROWS = sharding.RULES["batch"]
BY_ROW = PartitionSpec(ROWS)


def per_device(function: Callable[..., Any], given: Any, out: Any) -> Callable[..., Any]:
    """Returns a function that each device computes on its parts; the mesh axis `tensor` is left to the partitioner.

    Args:
        function: arrays of one device -> arrays of one device.
        given: how the arguments are split.
        out: how the results are split.

    Returns:
        The function of whole arrays.
    """
    return jax.shard_map(function, in_specs=given, out_specs=out, axis_names={*ROWS}, check_vma=False)


def all_to_all(x: Array, split: int, joined: int) -> Array:
    """Splits one axis over `fsdp` and joins the parts of another, in a function of `per_device`."""
    if sharding.platform() != "cpu":
        return jax.lax.all_to_all(x, "fsdp", split, joined, tiled=True)
    # A CPU runs an all-to-all in no fixed order with other collectives, as it does permutations: devices then wait for
    # one another until XLA ends the process (jaxlib 0.10.2). It has the order of a gather.
    whole = jax.lax.all_gather(x, "fsdp", axis=joined, tiled=True)
    size = x.shape[split] // jax.lax.axis_size("fsdp")
    return jax.lax.dynamic_slice_in_dim(whole, _index() * size, size, split)


def _index() -> Array:
    """Number of the device along `fsdp`; XLA refuses `axis_index` in programs that leave the axis `tensor` to it."""
    count = jax.lax.axis_size("fsdp")
    return jax.lax.psum_scatter(jnp.arange(count), "fsdp") // count


def sum_over_rows(
    function: Callable[[Any, Any, Any], Any],
    weights: Sequence[Array],
    names: Sequence[Sequence[str]],
    rows: Any,
    whole: Any,
    *,
    dtypes: Sequence[DTypeLike],
    padding: Any,
    apart: str = "",
) -> Any:
    """Computes function(weights, rows, whole) on each device's part of the rows, and sums the results.

    Each device gathers the weights once and sums their gradient over its own rows; one exchange adds the gradients of
    all devices and splits them again. Without a mesh that splits rows, it is one call on all rows.

    Args:
        function: returns a tree of sums over the rows.
        weights: arrays, split by the mesh's rules.
        names: axis names of each of them.
        rows: tree of arrays [T, ...].
        whole: tree of arrays that every device needs whole; also those that `function` must not close over.
        dtypes: dtype in which each of the weights is sent; the function gets them in their own.
        padding: tree like `rows` of the values of rows that are added if the devices do not divide T.
        apart: name of an axis of the weights that stays split over `fsdp`, with zeros behind it if the devices do not
            divide it; the function combines the parts by `by_columns`. Empty for none.

    Returns:
        Tree of sums.
    """
    count = sharding.padded_batch_size(1)
    if count == 1:
        return function(weights, rows, whole)
    specs = [sharding.spec(axes, leaf.shape) for axes, leaf in zip(names, weights, strict=True)]
    dims = [next((i for i, part in enumerate(spec) if part and "fsdp" in part), None) for spec in specs]
    split = [PartitionSpec(*[None] * dim, "fsdp") if dim is not None else PartitionSpec() for dim in dims]

    def of_device(weight: Array, axes: Sequence[str], dim: int | None, dtype: DTypeLike) -> Array:
        if apart in axes:
            return _part(weight, dim, axes.index(apart), dtype)
        return weight if dim is None else _gathered(weight, dim, dtype)

    def here(weights: list[Array], rows: Any, whole: Any) -> Any:
        used = [of_device(*each) for each in zip(weights, names, dims, dtypes, strict=True)]
        return jax.tree.map(lambda total: total[None], function(used, rows, whole))

    def padded(leaf: Array, value: float) -> Array:
        widths = ((0, -leaf.shape[0] % count),) + ((0, 0),) * (leaf.ndim - 1)
        return jnp.pad(leaf, widths, constant_values=value)

    parts = per_device(here, (split, BY_ROW, PartitionSpec()), BY_ROW)(
        list(weights), jax.tree.map(padded, rows, padding), whole
    )
    return jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), parts)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gathered(weight: Array, dim: int, dtype: DTypeLike) -> Array:
    """Gathers a weight over `fsdp` in `dtype`; its gradient is summed in float32."""
    return jax.lax.all_gather(weight.astype(dtype), "fsdp", axis=dim, tiled=True).astype(weight.dtype)


_gathered.defvjp(
    lambda weight, dim, dtype: (_gathered(weight, dim, dtype), None),
    lambda dim, dtype, _, gradient: (jax.lax.psum_scatter(gradient, "fsdp", scatter_dimension=dim, tiled=True),),
)


def by_columns(function: Callable[[Array], Array], size: int) -> Callable[[Array], Array]:
    """Returns a function of a device's own rows, in a function of `per_device` or of `sum_over_rows`.

    Devices exchange rows and columns in place of weights: each computes its own columns of the rows of all devices.

    Args:
        function: rows [T, ...] -> its columns [T, C], of the device's parts of the weights.
        size: number of columns of all devices.

    Returns:
        Rows [T, ...] -> all columns [T, size].
    """

    def of_rows(rows: Array) -> Array:
        return all_to_all(function(_all_rows(rows)), 0, 1)[:, :size]

    return of_rows


@jax.custom_vjp
def _all_rows(rows: Array) -> Array:
    """Gathers rows; the devices' parts of their gradient are summed in float32."""
    return jax.lax.all_gather(rows, "fsdp", tiled=True)


def _all_rows_backward(_: None, gradient: Array) -> tuple[Array]:
    return (jax.lax.psum_scatter(gradient.astype(jnp.float32), "fsdp", tiled=True).astype(gradient.dtype),)


_all_rows.defvjp(lambda rows: (_all_rows(rows), None), _all_rows_backward)


def _part(weight: Array, dim: int | None, axis: int, dtype: DTypeLike) -> Array:
    """The device's part of another axis of a weight than the one by which it is split, if any."""
    count = jax.lax.axis_size("fsdp")
    widths = [(0, -size % count if i == axis else 0) for i, size in enumerate(weight.shape)]
    weight = jnp.pad(weight, widths)
    if dim is not None:
        return _exchanged(weight, axis, dim, dtype)
    size = weight.shape[axis] // count
    return jax.lax.dynamic_slice_in_dim(weight, _index() * size, size, axis)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _exchanged(weight: Array, split: int, joined: int, dtype: DTypeLike) -> Array:
    """`all_to_all` in `dtype`; its gradient is sent as it is."""
    return all_to_all(weight.astype(dtype), split, joined).astype(weight.dtype)


_exchanged.defvjp(
    lambda weight, split, joined, dtype: (_exchanged(weight, split, joined, dtype), None),
    lambda split, joined, dtype, _, gradient: (all_to_all(gradient, joined, split),),
)
