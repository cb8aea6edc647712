"""Rows of a table of embeddings, each device those of its part of a batch."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from antgmm_jax.parallel import sharding
from antgmm_jax.parallel.rows import BY_ROW, all_to_all, per_device

COLUMNS = PartitionSpec(None, "fsdp")


def rows_of(table: Float[Array, "V D"], axis: str, ids: Int[Array, "B ..."]) -> Float[Array, "B ... D"]:
    """Looks up rows of a table.

    Where the mesh splits its columns over `fsdp`, the table stays split: each device looks up the ids of all devices in
    its own columns, and they exchange columns for rows. A device's tokens are fewer than a vocabulary, so less is sent
    than to gather the table, and no device has all of it or of its gradient.

    Args:
        table: the table, split by the mesh's rules.
        axis: name of its first axis; the second one is "text/embed".
        ids: numbers of its rows, split over the devices by their first axis.

    Returns:
        The rows, split as `ids`.
    """
    columns = sharding.spec((axis, "text/embed"), table.shape)[1] if sharding.splits_widths() else None
    if columns and not ids.shape[0] % sharding.padded_batch_size(1):
        return _exchanged(table, ids)
    return sharding.place(lookup(sharding.place(table, (axis,)), ids), ("batch",))


@jax.custom_vjp
def lookup(table: Float[Array, "V D"], ids: Int[Array, "..."]) -> Float[Array, "... D"]:
    """Rows of a table. Gradients are summed in float32: a common token occurs thousands of times in a batch."""
    return table[ids]


def _lookup_backward(saved, dy):
    table, ids = saved
    return _summed(table, ids, dy).astype(table.dtype), None


def _summed(table: Array, ids: Array, dy: Array) -> Array:
    """Gradient of a table in float32."""
    return jnp.zeros_like(table, jnp.float32).at[ids].add(dy.astype(jnp.float32))


lookup.defvjp(lambda table, ids: (table[ids], (table, ids)), _lookup_backward)


@jax.custom_vjp
def _exchanged(table: Array, ids: Array) -> Array:
    """Rows of a table that is split by columns."""

    def here(table: Array, ids: Array) -> Array:
        x = table[jax.lax.all_gather(ids, "fsdp", tiled=True)]
        return all_to_all(x, 0, x.ndim - 1)

    return per_device(here, (COLUMNS, BY_ROW), BY_ROW)(table, ids)


def _exchanged_backward(saved: tuple[Array, Array], dy: Array) -> tuple[Array, None]:
    def here(table: Array, ids: Array, dy: Array) -> Array:
        dy = all_to_all(dy, dy.ndim - 1, 0)
        return jax.lax.psum(_summed(table, jax.lax.all_gather(ids, "fsdp", tiled=True), dy), "data")

    table, ids = saved
    return per_device(here, (COLUMNS, BY_ROW, BY_ROW), COLUMNS)(table, ids, dy).astype(table.dtype), None


_exchanged.defvjp(lambda table, ids: (_exchanged(table, ids), (table, ids)), _exchanged_backward)
