"""Rotary positions (RoFormer, arXiv 2104.09864) in the half-split layout of Hugging Face, along one axis or several."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


class Rope(NamedTuple):
    """Cosines and sines of rotary positions, [B, T, head_dim / 2] float32."""

    cos: Array
    sin: Array


def rope(
    positions: Int[Array, "B T *A"],
    head_dim: int,
    theta: float,
    sections: Sequence[int] = (),
    *,
    interleaved: bool = True,
    factor: float = 1.0,
) -> Rope:
    """Computes the rotary angles of token positions.

    Args:
        positions: token positions; [B, T, A] along A axes.
        head_dim: width of a head.
        theta: base of the geometric series of wavelengths.
        sections: number of frequencies of each axis.
        interleaved: whether the frequencies of the axes alternate, or those of one axis follow those of another.
        factor: the frequencies are divided by it, for more positions than a model was trained on.

    Returns:
        Cosines and sines.
    """
    if positions.ndim == 2:
        along = positions[..., None]
    else:
        along = positions[..., _alternating(head_dim // 2, sections) if interleaved else _in_turn(sections)]
    return _angles(along.astype(jnp.float32) * _frequencies(head_dim, theta) / factor)


def axial(rows: Int[Array, "B T"], columns: Int[Array, "B T"], head_dim: int, theta: float) -> Rope:
    """Computes the rotary angles of patches: half of the frequencies for the row, half for the column."""
    frequency = _frequencies(head_dim // 2, theta)
    angles = [at[..., None].astype(jnp.float32) * frequency for at in (rows, columns)]
    return _angles(jnp.concatenate(angles, axis=-1))


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
    cos, sin = by.cos[:, :, None, :], by.sin[:, :, None, :]
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
