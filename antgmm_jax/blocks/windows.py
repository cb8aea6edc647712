"""Attention within windows, segments of few positions that follow one another: its cost grows linearly with a row."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int

from antgmm_jax.blocks.flash import padded
from antgmm_jax.parallel.sharding import platform

BLOCK = 64
"""Positions of a block on a CPU (`blocked.attend`): those of a usual window. For a picture of 37 x 37 squares, 5 476
patches of 16 heads of 80 in windows of 64, the gradient of attention alone takes 0.43 to 0.47 s of CPU time and 0.23 GB
in blocks of 64, 0.66 s in those of 128, 1.1 s in those of 256; in pieces of 128, whose logits are in memory together,
0.75 s and 0.47 GB. Of the gradient of a whole layer, blocks save 5 % of the time."""
_PIECE = 8
"""Windows per piece of a row elsewhere. A piece reads also the window before and the one after it; kernels need pieces
that are as long as their blocks."""
_FEWEST, _FEWEST_ON_CPU = 4 * _PIECE, 8
"""Windows of a row from which pieces and blocks pay."""


class Windows(NamedTuple):
    """The windows in which some layers of a stack attend.

    Attributes:
        segments: number of each position's window [B, T]; the positions of a window follow one another.
        reach: the largest number of positions of a window.
        used: whether a layer attends in windows; it may be a traced bool.
    """

    segments: Int[Array, "B T"]
    reach: int
    used: Any = True


def pay(windows: Windows, length: int) -> bool:
    """Whether attention within windows is cheaper than attention to a whole row.

    Args:
        windows: the windows.
        length: positions of a row.
    """
    return length >= windows.reach * (_FEWEST_ON_CPU if platform() == "cpu" else _FEWEST)


def attend(
    run: Callable[[Array, Array, Array, tuple[Array, Array]], Array],
    q: Float[Array, "B T N d"],
    k: Float[Array, "B K T d"],
    v: Float[Array, "B K T d"],
    *,
    segments: Int[Array, "B T"],
    reach: int,
) -> Float[Array, "B T N d"]:
    """Computes self-attention within windows, for pieces of rows as for rows of their own.

    Args:
        run: attention of rows of queries, keys and values, and the segments of queries and of keys: queries see the
            keys of their own.
        q: queries.
        k, v: keys and values, heads before positions; N is a multiple of K.
        segments: number of each position's window.
        reach: the largest number of positions of a window.

    Returns:
        Outputs of the heads.
    """
    (rows, length), size = segments.shape, _PIECE * reach
    numbers = rearrange(padded(segments, 1, -1, size=size), "b (n t) -> (b n) t", t=size)
    q = rearrange(padded(q, 1, size=size), "b (n t) h d -> (b n) t h d", t=size)
    k, v = (_with_ends(x, 2, size, reach) for x in (k, v))
    out = run(q, k, v, (numbers, _with_ends(segments, 1, size, reach, value=-1)))
    return rearrange(out, "(b n) t h d -> b (n t) h d", b=rows)[:, :length]


def _with_ends(x: Array, axis: int, size: int, reach: int, value: int = 0) -> Array:
    """Cuts an axis into pieces, rows of their own, with the `reach` positions before and after each."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (size, size + -x.shape[axis] % size)
    x = jnp.pad(x, widths, constant_values=value)
    x = x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :])

    def part(pieces: slice, positions: slice) -> Array:
        at = [slice(None)] * x.ndim
        at[axis : axis + 2] = pieces, positions
        return x[tuple(at)]

    before, after = part(slice(None, -2), slice(size - reach, None)), part(slice(2, None), slice(reach))
    whole = jnp.concatenate([before, part(slice(1, -1), slice(None)), after], axis=axis + 1)
    whole = jnp.moveaxis(whole, axis, 1)
    return whole.reshape(-1, *whole.shape[2:])
