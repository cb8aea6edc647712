"""Kernels with low-rank adapters, for linear maps of which only the adapters are trained."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from antgmm_jax.parallel import sharding


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LowRank:
    """A kernel W and its adapter: the map is x W + (x a) b, so that training a and b needs no gradient of W.

    Attributes:
        kernel: W, [inputs..., outputs...]; in a stack, with a leading axis of layers, as the factors.
        a: first factor, [inputs, rank], with flat inputs.
        b: second factor, [rank, outputs], with flat outputs.
    """

    kernel: Float[Array, "..."]
    a: Float[Array, "... inputs rank"]
    b: Float[Array, "... rank outputs"]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the kernel."""
        return self.kernel.shape

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the kernel."""
        return self.kernel.dtype

    def __getitem__(self, index: Any) -> "LowRank":
        """Indexes the leading axes of all three arrays, as `nnx.Param` does with `[...]`."""
        return LowRank(self.kernel[index], self.a[index], self.b[index])


def gathered(value: Any, names: tuple[str, ...]) -> Any:
    """Gathers a parameter over the mesh (`sharding.gathered`); adapters are not split.

    Args:
        value: array, or `LowRank`.
        names: axis names of the array or kernel.
    """
    if isinstance(value, LowRank):
        return replace(value, kernel=sharding.gathered(value.kernel, names))
    return sharding.gathered(value, names)
