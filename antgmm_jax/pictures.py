"""Pictures of a batch as a tree of arrays: what every part may know of it, and squares of pixels.

`batch["images"]` is a dict whose leaves lie [B, M, ...]: B rows with M picture slots each, those in use first. `valid`
bool [B, M] says which are; the other leaves are for the family that made them. Features that stand in for pictures are
`batch["vision_features"]` [B, M, N, D], beside `valid`.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

Images = Mapping[str, Any]


def normalised(images: Images) -> Float[Array, "S H W C"]:
    """The pictures of all rows, one after the other, as the image encoder reads them.

    Args:
        images: `pixels` [B, M, H, W, C]; uint8 with `scale` and `offset` float32 [B, M, C], or float and normalised.

    Returns:
        float32 `pixels * scale + offset`, S = B * M.
    """
    pixels = flat(images["pixels"]).astype(jnp.float32)
    if "scale" not in images:
        return pixels
    scale, offset = (flat(images[name])[:, None, None, :] for name in ("scale", "offset"))
    return pixels * scale + offset


def as_hf(images: Images) -> np.ndarray:
    """The pictures as `transformers` models take them, on the host: one after the other, without the slots in no use.

    Args:
        images: as `normalised` takes them.

    Returns:
        `pixel_values` float32 [K, C, H, W].
    """
    valid = np.asarray(images["valid"])
    pixels = np.asarray(images["pixels"])[valid].astype(np.float32)
    if "scale" in images:
        scale, offset = (np.asarray(images[name])[valid][:, None, None, :] for name in ("scale", "offset"))
        pixels = pixels * scale + offset
    return np.ascontiguousarray(np.moveaxis(pixels, -1, 1))


def flat(leaf: Array) -> Array:
    """A leaf [B, M, ...] as [B * M, ...]."""
    return leaf.reshape(-1, *leaf.shape[2:])


def by_row(states: Array, images: Images) -> Array:
    """What was computed of all slots, [B * M, ...], row by row: [B, M, ...]."""
    return states.reshape(*images["valid"].shape, *states.shape[1:])


def valid_slots(batch: Mapping[str, Any]) -> Bool[Array, "S 1"]:
    """Which picture slots of a batch hold a picture, as a mask of states [B * M, N]."""
    return batch["images"]["valid"].reshape(-1, 1)


def has_pixels(batch: Mapping[str, Any]) -> bool:
    """Whether a batch holds pictures themselves and not only which slots are in use."""
    return len(batch.get("images", ())) > 1
