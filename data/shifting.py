"""Random shifts of images by a few pixels, for augmentation."""

import numpy as np
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
