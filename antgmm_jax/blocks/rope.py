"""Rotary positions (RoFormer, arXiv 2104.09864) in the half-split layout of Hugging Face, along one axis or several."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from antgmm_jax.config import Llama3Rope, Yarn
from antgmm_jax.parallel.sharding import platform


class Rope(NamedTuple):
    """Cosines and sines of rotary positions, [B, T, head_dim / 2] float32, and a factor of the queries [B, T]."""

    cos: Array
    sin: Array
    query_factor: Array | None = None


def rope(
    positions: Int[Array, "B T *A"],
    head_dim: int,
    theta: float,
    sections: Sequence[int] = (),
    *,
    interleaved: bool = True,
    factor: float = 1.0,
    yarn: Yarn | None = None,
    llama3: Llama3Rope | None = None,
) -> Rope:
    """Computes the rotary angles of token positions.

    Args:
        positions: token positions; [B, T, A] along A axes.
        head_dim: width of a head.
        theta: base of the geometric series of wavelengths.
        sections: number of frequencies of each axis.
        interleaved: whether the frequencies of the axes alternate, or those of one axis follow those of another.
        factor: the frequencies are divided by it, for more positions than a model was trained on.
        yarn: how positions along one axis are stretched.
        llama3: which frequencies are divided for longer texts.

    Returns:
        Cosines and sines, and with `yarn` a factor of the queries.
    """
    if yarn is not None:
        angles = _angles(positions[..., None].astype(jnp.float32) * stretched(head_dim, theta, yarn)[None, None])
        beyond = jnp.floor(positions.astype(jnp.float32) / yarn.original)
        return angles._replace(query_factor=1 + yarn.query_growth * jnp.log1p(beyond))
    if positions.ndim == 2:
        along = positions[..., None]
    else:
        along = positions[..., _alternating(head_dim // 2, sections) if interleaved else _in_turn(sections)]
    frequencies = _frequencies(head_dim, theta) if llama3 is None else slowed(head_dim, theta, llama3)[None, None]
    return _angles(along.astype(jnp.float32) * frequencies / factor)


def axial(
    rows: Int[Array, "B T"], columns: Int[Array, "B T"], head_dim: int, theta: float, *, alternating: bool = False
) -> Rope:
    """Computes the rotary angles of patches: half of the frequencies for the row, half for the column.

    Args:
        rows, columns: row and column of each patch.
        head_dim: width of a head.
        theta: base of the geometric series of wavelengths.
        alternating: whether rows and columns take turns in one series of frequencies, or have the same half as many.

    Returns:
        Cosines and sines.
    """
    if alternating:
        whole = _frequencies(head_dim, theta)
        halves = (whole[..., ::2], whole[..., 1::2])
    else:
        halves = (_frequencies(head_dim // 2, theta),) * 2
    angles = [at[..., None].astype(jnp.float32) * own for at, own in zip((rows, columns), halves, strict=True)]
    return _angles(jnp.concatenate(angles, axis=-1))


def stretched(width: int, theta: float, yarn: Yarn) -> Float[np.ndarray, " F"]:
    """Returns the frequencies of YaRN, float32."""

    def place(rotations: float) -> float:
        """Index of the frequency that rotates so often over the original positions."""
        return width * math.log(yarn.original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = max(math.floor(place(yarn.fast)), 0), min(math.ceil(place(yarn.slow)), width - 1)
    divided = np.clip((np.arange(width // 2) - low) / (high - low or 0.001), 0, 1)
    whole = _series(width, theta)
    return (whole * (1 - divided) + whole / yarn.factor * divided).astype(np.float32)


def slowed(width: int, theta: float, llama3: Llama3Rope) -> Float[np.ndarray, " F"]:
    """Returns the frequencies of Llama 3.1, float32."""
    whole = _series(width, theta)
    rotations = llama3.original * whole / (2 * np.pi)
    kept = np.clip((rotations - llama3.low) / (llama3.high - llama3.low), 0, 1)
    return (whole * kept + whole / llama3.factor * (1 - kept)).astype(np.float32)


def _series(width: int, theta: float) -> Float[np.ndarray, " F"]:
    return theta ** (-np.arange(0, width, 2) / width)


def _frequencies(width: int, theta: float) -> Float[Array, "1 1 F"]:
    return theta ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)[None, None]


def _in_turn(sections: Sequence[int]) -> np.ndarray:
    """Axis of each frequency: 0 0 ... 1 1 ... 2 2 ..."""
    return np.repeat(np.arange(len(sections)), sections)


def _alternating(count: int, sections: Sequence[int]) -> np.ndarray:
    """Axis of each frequency: 0 1 2 0 1 2 ..., and 0 after the last frequency of another axis."""
    axes = np.zeros(count, np.int32)
    for axis, size in enumerate(sections[1:], 1):
        axes[axis : size * len(sections) : len(sections)] = axis
    return axes


def _angles(angles: Float[Array, "B T F"]) -> Rope:
    return Rope(jnp.cos(angles), jnp.sin(angles))


def rotate(x: Float[Array, "B T H d"], by: Rope) -> Float[Array, "B T H d"]:
    """Rotates each head by the angles of its position."""
    if platform() == "tpu" and x.dtype == jnp.bfloat16:
        return rotate_by_product(x, by)
    cos, sin = by.cos[:, :, None, :], by.sin[:, :, None, :]
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def rotate_by_product(x: Float[Array, "B T H d"], by: Rope) -> Float[Array, "B T H d"]:
    """Rotates as `rotate`, to the bit; the halves of a head change places in a product with a permutation.

    Halves of 64 columns would fill half of the lanes of a TPU's registers and tiles.
    """
    width = x.shape[-1]
    swap = np.roll(np.eye(width, dtype=np.float32), width // 2, axis=1)
    cos = jnp.concatenate([by.cos, by.cos], axis=-1)[:, :, None, :]
    sin = jnp.concatenate([-by.sin, by.sin], axis=-1)[:, :, None, :]
    # Exact in the dtype of x; a result in float32 would take twice the memory where products are stored.
    swapped = jnp.matmul(x, jnp.asarray(swap, x.dtype))
    return (x.astype(jnp.float32) * cos + swapped.astype(jnp.float32) * sin).astype(x.dtype)
