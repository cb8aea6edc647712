"""Arrays that stay on disk, so that a model need not fit into memory."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Stored:
    """A parameter that is read from disk layer by layer, without caching; `numpy.asarray` reads all of it.

    Attributes:
        shape: shape of the whole array.
        dtype: its dtype.
        read: layer -> values of the layer without the leading axis (-1 -> values of an array without layers), in the
            file's memory order, so possibly a transposed view.
        stacked: whether the leading axis counts layers.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[int], np.ndarray]
    stacked: bool

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole array."""
        return self.size * self.dtype.itemsize

    def parts(self) -> Iterator[np.ndarray]:
        """Iterates over the layers; an array without layers is one part."""
        return map(self.read, range(self.shape[0]) if self.stacked else (-1,))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("a stored array cannot be converted without a copy")
        whole = np.empty(self.shape, dtype or self.dtype)
        for target, part in zip(whole if self.stacked else (whole,), self.parts(), strict=True):
            target[...] = part
        return whole


def in_memory_order(array: np.ndarray, names: tuple[str, ...]) -> tuple[np.ndarray, tuple[str, ...], tuple[int, ...]]:
    """Transposes an array to its memory order (outermost axis first), which NumPy and JAX can read without a copy.

    Args:
        array: an array, possibly a transposed view.
        names: names of its axes.

    Returns:
        The transposed view, its axis names, and the permutation that restores the original order.
    """
    order = sorted(range(array.ndim), key=lambda axis: -array.strides[axis])
    back = sorted(range(array.ndim), key=order.__getitem__)
    return array.transpose(order), tuple(names[axis] for axis in order), tuple(back)
