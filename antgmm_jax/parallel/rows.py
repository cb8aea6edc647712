"""Sums over the rows of a batch, each device over its own rows with weights gathered once."""

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
    # A CPU runs an all-to-all in no fixed order with other collectives: devices then wait for one another until XLA
    # ends the process (jaxlib 0.10.2). It has the order of a gather.
    whole = jax.lax.all_gather(x, "fsdp", axis=joined, tiled=True)
    count = jax.lax.axis_size("fsdp")
    size = x.shape[split] // count
    # The device's own number; XLA refuses `axis_index` here in programs that leave the mesh axis `tensor` to it.
    index = jax.lax.psum_scatter(jnp.arange(count), "fsdp") // count
    return jax.lax.dynamic_slice_in_dim(whole, index * size, size, split)


def sum_over_rows(
    function: Callable[[Any, Any, Any], Any],
    weights: Sequence[Array],
    names: Sequence[Sequence[str]],
    rows: Any,
    whole: Any,
    *,
    dtype: DTypeLike,
    padding: Any,
) -> Any:
    """Computes function(weights, rows, whole) on each device's part of the rows, and sums the results.

    Each device gathers the weights once and sums their gradient over its own rows; one exchange adds the gradients of
    all devices and splits them again. Without a mesh that splits rows, it is one call on all rows.

    Args:
        function: returns a tree of sums over the rows.
        weights: arrays, split by the mesh's rules; they are gathered in `dtype`.
        names: axis names of each of them.
        rows: tree of arrays [T, ...].
        whole: tree of arrays that every device needs whole; also those that `function` must not close over.
        dtype: dtype in which weights are sent; the function gets them in their own.
        padding: tree like `rows` of the values of rows that are added if the devices do not divide T.

    Returns:
        Tree of sums.
    """
    count = sharding.padded_batch_size(1)
    if count == 1:
        return function(weights, rows, whole)
    specs = [sharding.spec(axes, leaf.shape) for axes, leaf in zip(names, weights, strict=True)]
    dims = [next((i for i, part in enumerate(spec) if part and "fsdp" in part), None) for spec in specs]
    split = [PartitionSpec(*[None] * dim, "fsdp") if dim is not None else PartitionSpec() for dim in dims]

    def here(weights: list[Array], rows: Any, whole: Any) -> Any:
        full = [w if dim is None else _gathered(w, dim, dtype) for w, dim in zip(weights, dims, strict=True)]
        return jax.tree.map(lambda total: total[None], function(full, rows, whole))

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
