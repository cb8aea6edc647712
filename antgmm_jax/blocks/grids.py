"""Images of any size, cut into squares: one slot per square.

`images["place"]`, int32 [B, M, 4], is the row and the column of a slot's square in its image, and the number of rows
and of columns of squares of that image. The squares of an image fill consecutive slots, row by row. A family may add
columns to the four.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from antgmm_jax.blocks import packing
from antgmm_jax.blocks.pictures import Images


def places(rows: int, columns: int) -> Int[np.ndarray, "M 4"]:
    """Returns the `place` of each square of an image, on the host."""
    at = np.stack(np.divmod(np.arange(rows * columns), columns), axis=1)
    return np.concatenate([at, np.tile((rows, columns), (len(at), 1))], axis=1).astype(np.int32)


def image_of_slot(images: Mapping[str, Any]) -> Int[Array, "B M"]:
    """Numbers the images of each row from 1, for each of their slots; 0 for unused slots.

    The slots of an image begin with its first square; the others may have any order.
    """
    valid, at = images["valid"], images["place"][..., :2]
    begins = valid & (at == 0).all(axis=-1)
    return jnp.where(valid, jnp.cumsum(begins, axis=1), 0)


def window_of_slot(images: Mapping[str, Any], side: int) -> Int[Array, "B M"]:
    """Numbers the windows of `side` by `side` squares of each row, for each of their slots; -1 for unused slots.

    Windows start at the first square of an image, and those at its far edges are smaller. The number
    of a window is the slot of its first square.
    """
    row, column, _, columns = jnp.moveaxis(images["place"], -1, 0)
    first = jnp.arange(row.shape[1])[None] - (row % side) * columns - column % side
    return jnp.where(images["valid"], first, -1)


class Order(NamedTuple):
    """An order of the slots of each row.

    Attributes:
        slots: the slot that comes to each place [B, M].
        inverse: the place that each slot comes to [B, M].
    """

    slots: Int[Array, "B M"]
    inverse: Int[Array, "B M"]


def by_window(images: Images, side: int) -> tuple[Images, Int[Array, "B M"], Order]:
    """Puts the slots of each row in the order of their windows.

    Args:
        images: images as leaves [B, M, ...].
        side: squares per side of a window.

    Returns:
        The images, the number of each slot's window, and the way back to the first order.
    """
    numbers = window_of_slot(images, side)
    ahead = jnp.argsort(jnp.where(images["valid"], numbers, numbers.shape[1]), axis=1)
    images, numbers = jax.tree.map(lambda x: _taken(x, ahead), (dict(images), numbers))
    return images, numbers, Order(jnp.argsort(ahead, axis=1), ahead)


@jax.custom_vjp
def reordered(x: Float[Array, "B M ..."], order: Order) -> Float[Array, "B M ..."]:
    """Puts values of slots into an order. The gradient gathers; that of indexing would scatter."""
    return _taken(x, order.slots)


def _taken(x: Array, slots: Int[Array, "B M"]) -> Array:
    return jnp.take_along_axis(x, slots.reshape(*slots.shape, *[1] * (x.ndim - 2)), axis=1)


reordered.defvjp(
    lambda x, order: (_taken(x, order.slots), order.inverse),
    lambda inverse, gradient: (_taken(gradient, inverse), None),
)


def image_states(ids: Int[Array, "B T"], image_token: int, states: Array) -> tuple[Bool[Array, "B T"], Array]:
    """Gathers the state of each image token: the n-th image token of a row gets the n-th state of its slots.

    Args:
        ids: token ids.
        image_token: id of the image token.
        states: states of the slots of each row, [B, N, ...].

    Returns:
        Which tokens are image tokens, and a state per token, [B, T, ...], arbitrary for the other tokens.
    """
    is_image = ids == image_token
    order = jnp.clip(jnp.cumsum(is_image, axis=1) - 1, 0, states.shape[1] - 1)
    return is_image, jnp.take_along_axis(states, order.reshape(*order.shape, *[1] * (states.ndim - 2)), axis=1)


def token_places(
    ids: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
    place: Int[Array, "B M 4"],
    image_token: int,
    segments: Int[Array, "B T"] | None = None,
) -> Int[Array, "B T 3"]:
    """Computes the positions of multimodal RoPE (arXiv 2409.12191): time, row and column.

    All tokens of an image have the time t at which it begins; their rows and columns are t plus those of their squares.
    The next token follows at t plus the longer side of the image.

    Args:
        ids: token ids.
        valid: which positions are tokens.
        place: place of each slot.
        image_token: id of the image token; there is one per slot.
        segments: sample of each position of packed rows; the positions of each sample begin at 0.

    Returns:
        Positions.
    """
    is_image, at = image_states(ids, image_token, place)
    is_image = is_image & valid
    last = (at[..., :2] + 1 == at[..., 2:]).all(axis=-1)
    steps = jnp.where(is_image, jnp.where(last, at[..., 2:].max(axis=-1), 0), valid.astype(jnp.int32))
    time = jnp.cumsum(steps, axis=1) - steps
    if segments is not None:
        time = time - jnp.take_along_axis(time, packing.starts(segments), axis=1)
    inside = jnp.where(is_image[..., None], at[..., :2], 0)
    return jnp.concatenate([time[..., None], time[..., None] + inside], axis=-1)


def interpolated(
    table: Float[Array, "S D"], rows: Int[Array, "B N"], columns: Int[Array, "B N"], size: Int[Array, "B N 2"]
) -> Float[Array, "B N D"]:
    """Interpolates a square table bilinearly at patches; its corners coincide with those of each image.

    Args:
        table: entries, row by row.
        rows, columns: row and column of each patch in its image.
        size: number of rows and of columns of patches of that image.

    Returns:
        Interpolated values, float32.
    """
    side = round(table.shape[0] ** 0.5)
    (y, wy), (x, wx) = (_taps(at, size[..., axis], side) for axis, at in enumerate((rows, columns)))
    index = y[..., :, None] * side + x[..., None, :]
    weights = wy[..., :, None] * wx[..., None, :]
    return jnp.einsum("bnyxd,bnyx->bnd", table.astype(jnp.float32)[index], weights)


def _taps(
    at: Int[Array, "B N"], size: Int[Array, "B N"], side: int
) -> tuple[Int[Array, "B N 2"], Float[Array, "B N 2"]]:
    """The two entries next to a position along one axis of the table, and their weights."""
    along = at.astype(jnp.float32) * (side - 1) / jnp.maximum(size - 1, 1)
    first = jnp.floor(along)
    share = along - first
    entries = jnp.clip(first.astype(jnp.int32)[..., None] + jnp.arange(2)[None, None], 0, side - 1)
    return entries, jnp.stack([1 - share, share], axis=-1)
