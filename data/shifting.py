"""Pictures moved by a few pixels: other views of what stays the same to read."""

import numpy as np
from jaxtyping import Int, UInt8


def shifted(images: UInt8[np.ndarray, "N H W C"], by: Int[np.ndarray, "N 2"]) -> UInt8[np.ndarray, "N H W C"]:
    """Pictures moved down and to the right, each by its own pixels; what comes in repeats the edge.

    Args:
        images: the pictures.
        by: rows and columns, negative ones up and to the left.

    Returns:
        New pictures.
    """
    most, (high, wide) = int(np.abs(by).max(initial=0)), images.shape[1:3]
    padded = np.pad(images, ((0, 0), (most, most), (most, most), (0, 0)), mode="edge")
    out = np.empty_like(images)
    for picture, wider, (down, right) in zip(out, padded, most - by, strict=True):
        picture[:] = wider[down : down + high, right : right + wide]
    return out


def drawn(rng: np.random.Generator, most: int, shape: tuple[int, ...]) -> Int[np.ndarray, "... 2"]:
    """Moves of at most so many pixels each way, all alike likely.

    Args:
        rng: the source of chance.
        most: pixels.
        shape: of the pictures that are moved.

    Returns:
        Rows and columns, [*shape, 2].
    """
    return rng.integers(-most, most + 1, (*shape, 2))
