"""Tiles of images of any size, and which tile each image token takes its state from.

`images["place"]`, int32 [B, M, 13], describes the slots. An image alone in its row is a base tile, which shows the
whole image, followed by a group of tiles, row by row, which show it enlarged and padded. Each of several images in a
row is a base tile only. The columns of `place` are:

* 0..3: row and column of the tile in its group, rows and columns of the group, as in `antgmm_jax.blocks.grids`;
* 4, 5: height and width of the image in pixels;
* 6..9: top, left, height and width of the area of the group that shows the image and not its padding, in patches;
* 10, 11: height and width of the area after it was shrunk, in image tokens;
* 12: newline tokens: none, one after all tokens, or one after each row of them.
"""

import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

COLUMNS = 13


def base(size: tuple[int, int], side: int, newlines: int) -> Int[np.ndarray, "1 13"]:
    """Returns the `place` of a base tile.

    Args:
        size: height and width of the image.
        side: patches per side of a tile.
        newlines: newline tokens after it.
    """
    return np.array([[0, 0, 1, 1, *size, 0, 0, side, side, side, side, newlines]], np.int32)


def group(size: tuple[int, int], shape: tuple[int, int], side: int, most: int) -> Int[np.ndarray, "M 13"]:
    """Returns the `place` of each tile that shows an image enlarged.

    Args:
        size: height and width of the image.
        shape: rows and columns of tiles.
        side: patches per side of a tile.
        most: maximum number of tokens, in tiles; larger areas are shrunk.
    """
    (rows, columns), area = shape, _area(size, (shape[0] * side, shape[1] * side))
    shrunk, ratio = area[2:], math.sqrt(math.prod(area[2:]) / (most * side**2))
    if ratio > 1.1:
        shrunk = tuple(int(length // ratio) for length in shrunk)
    at = np.stack(np.divmod(np.arange(rows * columns), columns), axis=1)
    shared = np.array([rows, columns, *size, *area, *shrunk, shrunk[0]])
    return np.concatenate([at, np.tile(shared, (len(at), 1))], axis=1).astype(np.int32)


def _area(size: tuple[int, int], canvas: tuple[int, int]) -> tuple[int, int, int, int]:
    """The area of a canvas, in patches, that shows the image, rounded as in transformers: top, left, height, width."""
    (height, width), (high, wide) = size, canvas
    if width / height > wide / high:
        padding = (high - int(round(height * (wide / width), 7))) // 2
        return padding, 0, high - 2 * padding, wide
    padding = (wide - int(round(width * (high / height), 7))) // 2
    return 0, padding, high, wide - 2 * padding


def images_of(place: Int[np.ndarray, "M 13"]) -> list[slice]:
    """Returns the slots of each image of a row, given the `place` of its used slots."""
    images, start = [], 0
    while start < len(place):
        alone = place[start, 12] == 0
        stop = start + 1 + (int(place[start + 1, 2:4].prod()) if alone else 0)
        images.append(slice(start, stop))
        start = stop
    return images


def tokens(place: Int[np.ndarray, "M 13"]) -> int:
    """Returns the number of image tokens of a row, newlines included."""
    first = (place[:, :2] == 0).all(axis=1)
    return int((first * (place[:, 10] * place[:, 11] + place[:, 12])).sum())


def sources(
    order: Int[Array, "B T"], place: Int[Array, "B M 13"], side: int
) -> tuple[Sequence[tuple[Int[Array, "B T"], Float[Array, "B T"]]], Bool[Array, "B T"]]:
    """Computes which states each image token takes its state from.

    Args:
        order: number of each image token in its row, from 0; arbitrary for other tokens.
        place: as above; 0 for unused slots.
        side: patches per side of a tile.

    Returns:
        Four pairs of a patch (slot * side ** 2 + patch in the tile) and its weight, and whether the token is a newline.
    """
    first = (place[..., :2] == 0).all(axis=-1)
    count = jnp.where(first, place[..., 10] * place[..., 11] + place[..., 12], 0)
    start = jnp.cumsum(count, axis=1) - count
    # The last group that begins at or before the token; empty groups begin where the next one does.
    begun = (start[:, None] <= order[..., None]) & (count > 0)[:, None]
    slot = jnp.where(begun, jnp.arange(place.shape[1])[None, None], 0).max(axis=-1)
    own = jnp.take_along_axis(place, slot[..., None], axis=1)
    _, _, _, columns, _, _, top, left, high, wide, lines, along, newlines = jnp.moveaxis(own, -1, 0)
    at = order - jnp.take_along_axis(start, slot, axis=1)
    in_line = jnp.where(newlines > 1, along, lines * along)
    period = jnp.maximum(in_line + (newlines > 0), 1)
    line, column = at // period, at % period
    flat = line * in_line + column
    y, x = (
        _taps(step, size, length, before)
        for step, size, length, before in (
            (flat // jnp.maximum(along, 1), high, lines, top),
            (flat % jnp.maximum(along, 1), wide, along, left),
        )
    )
    taps = []
    for row, row_weight in y:
        for patch, weight in x:
            tile = slot + row // side * columns + patch // side
            taps.append((tile * side**2 + row % side * side + patch % side, row_weight * weight))
    return taps, column == in_line


def _taps(
    step: Int[Array, "B T"], size: Int[Array, "B T"], length: Int[Array, "B T"], before: Int[Array, "B T"]
) -> tuple[tuple[Int[Array, "B T"], Float[Array, "B T"]], ...]:
    """The two entries next to a step along one axis when `size` entries, behind `before`, are shrunk to `length`."""
    scale = size.astype(jnp.float32) / jnp.maximum(length, 1).astype(jnp.float32)
    along = jnp.maximum((step.astype(jnp.float32) + 0.5) * scale - 0.5, 0)
    low = jnp.minimum(jnp.floor(along).astype(jnp.int32), size - 1)
    share = along - low.astype(jnp.float32)
    high = jnp.minimum(low + 1, size - 1)
    return (before + low, 1 - share), (before + high, share)
