"""Random shifts of images by a few pixels, for augmentation."""

import numpy as np
from einops import rearrange
from jaxtyping import Int, UInt8


def shifted(images: UInt8[np.ndarray, "N H W C"], by: Int[np.ndarray, "N 2"]) -> UInt8[np.ndarray, "N H W C"]:
    """Shifts images and fills the border by repeating the edge.

    Args:
        images: the images.
        by: shift of each image in rows (down) and columns (right); negative for up and left.

    Returns:
        Shifted images.
    """
    most, (high, wide) = int(np.abs(by).max(initial=0)), images.shape[1:3]
    padded = np.pad(images, ((0, 0), (most, most), (most, most), (0, 0)), mode="edge")
    out = np.empty_like(images)
    for picture, wider, (down, right) in zip(out, padded, most - by, strict=True):
        picture[:] = wider[down : down + high, right : right + wide]
    return out


def shifted_squares(
    squares: UInt8[np.ndarray, "M S S C"], place: Int[np.ndarray, "M P"], by: Int[np.ndarray, " 2"]
) -> UInt8[np.ndarray, "M S S C"]:
    """Shifts images that are cut into squares.

    Args:
        squares: squares of all images, row by row.
        place: place of each square in its first four columns (`antgmm_jax.blocks.grids`).
        by: vertical and horizontal shift in pixels.

    Returns:
        New squares.
    """
    out, start = np.empty_like(squares), 0
    while start < len(squares):
        high, wide = place[start, 2:4].tolist()
        span = slice(start, start + high * wide)
        whole = rearrange(squares[span], "(gy gx) y x c -> 1 (gy y) (gx x) c", gx=wide)
        out[span] = rearrange(shifted(whole, by[None]), "1 (gy y) (gx x) c -> (gy gx) y x c", gy=high, gx=wide)
        start = span.stop
    return out


def drawn(rng: np.random.Generator, most: int, shape: tuple[int, ...]) -> Int[np.ndarray, "... 2"]:
    """Draws uniformly distributed shifts of at most `most` pixels in each direction.

    Args:
        rng: random generator.
        most: maximum shift in pixels.
        shape: shape of the array of images.

    Returns:
        Shifts in rows and columns, [*shape, 2].
    """
    return rng.integers(-most, most + 1, (*shape, 2))
