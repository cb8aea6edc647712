"""Arrays that stay on disk: a tree of them stands for a model that need not fit into memory."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Stored:
    """An array that is read layer by layer, each time anew; a leaf wherever a parameter may stand.

    `numpy.asarray` reads the whole of it.

    Attributes:
        shape: its shape.
        dtype: its dtype.
        read: layer -> that layer's values, without the leading axis; -1 -> the values of an array that has no layers.
            In the memory order of the file, so that the array given may be a transposed view.
        stacked: whether the leading axis counts layers.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[int], np.ndarray]
    stacked: bool

    def parts(self) -> Iterator[np.ndarray]:
        """Each layer's values in turn; of an array that has no layers, all of it at once."""
        return map(self.read, range(self.shape[0]) if self.stacked else (-1,))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("a stored array cannot be had without reading it")
        whole = np.empty(self.shape, dtype or self.dtype)
        for target, part in zip(whole if self.stacked else (whole,), self.parts(), strict=True):
            target[...] = part
        return whole


def as_it_lies(array: np.ndarray, names: tuple[str, ...]) -> tuple[np.ndarray, tuple[str, ...], tuple[int, ...]]:
    """An array with its axes from the outermost in memory to the innermost: NumPy and JAX copy any other one first.

    Args:
        array: an array, perhaps a transposed view.
        names: its axes.

    Returns:
        The view, the names of its axes, and what `transpose` takes to go back.
    """
    order = sorted(range(array.ndim), key=lambda axis: -array.strides[axis])
    back = sorted(range(array.ndim), key=order.__getitem__)
    return array.transpose(order), tuple(names[axis] for axis in order), tuple(back)
