"""Pictures moved by a few pixels: other views of what stays the same to read."""

import numpy as np
from jaxtyping import Int, UInt8

from data.record import Arrays


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


def seen(batch: Arrays, rng: np.random.Generator, *, shift: int, shape: tuple[int, ...], own: np.ndarray) -> Arrays:
    """A batch as it is seen this time: its pictures moved at random, or of each one's computed views one.

    Chance is drawn for the rows of all processes, so that each is seen alike whichever process makes it.

    Args:
        batch: with `images` uint8 [*R, H, W, C] or `views` [*R, V, ...], R the shape with this process's rows.
        rng: the source of chance.
        shift: pixels by which `images` are moved, at most, each way; 0 leaves them.
        shape: of the pictures of all processes.
        own: rows of this process.

    Returns:
        The batch, with `vision_features` [*R, ...] in the place of `views`.
    """
    if "views" in batch:
        views = batch["views"]
        which = rng.integers(views.shape[len(shape)], size=shape)[own]
        one = np.take_along_axis(views, np.expand_dims(which, [*range(len(shape), views.ndim)]), axis=len(shape))
        rest = {name: value for name, value in batch.items() if name != "views"}
        return {**rest, "vision_features": one.squeeze(len(shape))}
    if shift:
        images, moves = batch["images"], drawn(rng, shift, shape)[own]
        moved = shifted(images.reshape(-1, *images.shape[-3:]), moves.reshape(-1, 2))
        return {**batch, "images": moved.reshape(images.shape)}
    return batch
