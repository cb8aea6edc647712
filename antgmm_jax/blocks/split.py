"""Kernels that stay split over the mesh: devices exchange a few rows in place of the weights."""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from antgmm_jax.blocks import low_rank
from antgmm_jax.parallel import sharding
from antgmm_jax.parallel.rows import BY_ROW, all_to_all, by_columns, per_device


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Split:
    """A kernel that the mesh splits over `fsdp` along its first or last axis.

    Attributes:
        kernel: [inputs..., outputs...].
        by_outputs: whether its last axis is split, or its first.
    """

    kernel: Float[Array, "..."]
    by_outputs: bool = field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the kernel."""
        return self.kernel.shape

    def __getitem__(self, index: Any) -> "Split":
        """The kernel as a whole, for `[...]`."""
        assert index is Ellipsis
        return self


def split(value: Any, names: tuple[str, ...]) -> Any:
    """Keeps a kernel split, for products with few rows; gathers other parameters.

    Args:
        value: array, or `LowRank`, which is gathered.
        names: axis names.
    """
    if isinstance(value, low_rank.LowRank) or not sharding.splits_widths():
        return low_rank.gathered(value, names)
    over = [part is not None and "fsdp" in part for part in sharding.spec(names, value.shape)]
    if len(over) > 1 and any(over[:: len(over) - 1]):
        return Split(value, by_outputs=over[-1])
    return sharding.gathered(value, names)


def product(x: Float[Array, "n k"], kernel: Split, columns: int, dtype: DTypeLike) -> Float[Array, "n m"]:
    """Multiplies rows by a split kernel; devices exchange rows, so each reads only its own part of the kernel.

    A device of a v5e-16 reads a 7 B model's weights for a token of 64 rows in 1 ms; to gather them takes 49, by the
    rate of its links.

    Args:
        x: rows, split over the devices of the mesh. If they are not divisible, the product is left to the partitioner.
        kernel: the kernel, with k inputs.
        columns: number m of its outputs.
        dtype: dtype of the result; sums are float32.

    Returns:
        x times the kernel, split as x.
    """
    flat = kernel.kernel.reshape(x.shape[1], columns)
    if x.shape[0] % sharding.padded_batch_size(1):
        return jnp.matmul(x, flat, preferred_element_type=dtype)

    def here(x: Array, part: Array) -> Array:
        if kernel.by_outputs:
            return by_columns(lambda whole: jnp.matmul(whole, part, preferred_element_type=dtype), columns)(x)
        sums = jnp.matmul(all_to_all(x, 1, 0), part, preferred_element_type=jnp.float32)
        return jax.lax.psum_scatter(sums, "fsdp", tiled=True).astype(dtype)

    where = PartitionSpec(*[None] * kernel.by_outputs, "fsdp")
    return per_device(here, (BY_ROW, where), BY_ROW)(x, flat)
