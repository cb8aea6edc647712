"""Images of a batch as a tree of arrays.

`batch["images"]` is a dict with leaves [B, M, ...]: B rows with M image slots each, used slots first. `valid`, bool
[B, M], marks the used slots; the family defines the other leaves. If images are cut into squares that attend to one
another, `place` is the position of each slot's square (`antgmm_jax.blocks.grids`). If the image side reads text too,
`instruction` int32 [B, M, L] holds its token ids, -1 behind the last one. Cached features replace the images
as `batch["vision_features"]` [B, M, N, D], together with `valid` and `place`.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

Images = Mapping[str, Any]


def normalised(images: Images) -> Float[Array, "S H W C"]:
    """Normalises the images of all rows for the image encoder.

    Args:
        images: `pixels` [B, M, H, W, C]; uint8 with `scale` and `offset` float32 [B, M, C], or normalised floats.

    Returns:
        float32 `pixels * scale + offset`, S = B * M.
    """
    pixels = flat(images["pixels"]).astype(jnp.float32)
    if "scale" not in images:
        return pixels
    scale, offset = (flat(images[name])[:, None, None, :] for name in ("scale", "offset"))
    return pixels * scale + offset


def as_hf(images: Images) -> np.ndarray:
    """Converts the images to the `pixel_values` of `transformers` models, without unused slots.

    Args:
        images: as for `normalised`.

    Returns:
        float32 [K, C, H, W] of the K used slots.
    """
    valid = np.asarray(images["valid"])
    pixels = np.asarray(images["pixels"])[valid].astype(np.float32)
    if "scale" in images:
        scale, offset = (np.asarray(images[name])[valid][:, None, None, :] for name in ("scale", "offset"))
        pixels = pixels * scale + offset
    return np.ascontiguousarray(np.moveaxis(pixels, -1, 1))


def from_hf(
    pixel_values: Float[Array, "..."], used: Int[Array, " B"], slots: int
) -> dict[str, Float[Array, "B M H W C"] | Bool[Array, "B M"]]:
    """The images of `pixel_values`, the inverse of `as_hf`; it can be traced.

    Args:
        pixel_values: float32 [K, C, H, W], the used slots of all rows one after another and any more behind them; or
            [B, M, C, H, W].
        used: used slots of each row.
        slots: slots of each row, M.
    """
    pixels = jnp.moveaxis(pixel_values, -3, -1)
    if pixels.ndim == 4:
        own = (jnp.cumsum(used) - used)[:, None] + jnp.arange(slots)[None, :]
        pixels = jnp.take(pixels, own, axis=0, mode="clip")
    return {"pixels": pixels, "valid": jnp.arange(slots)[None, :] < used[:, None]}


def flat(leaf: Array) -> Array:
    """Reshapes a leaf [B, M, ...] to [B * M, ...]."""
    return leaf.reshape(-1, *leaf.shape[2:])


def by_row(states: Array, images: Images) -> Array:
    """Reshapes states of all slots [B * M, ...] to [B, M, ...]."""
    return states.reshape(*images["valid"].shape, *states.shape[1:])


def valid_slots(batch: Mapping[str, Any]) -> Bool[Array | np.ndarray, "S 1"]:
    """Mask of the used image slots; it broadcasts to states [B * M, N]."""
    return batch["images"]["valid"].reshape(-1, 1)


def has_pixels(batch: Mapping[str, Any]) -> bool:
    """Whether a batch holds pixels, and not only `valid` and `place`."""
    return "pixels" in batch.get("images", ())


def without_pixels(images: Images) -> dict[str, Any]:
    """The leaves that a batch keeps if cached features replace its images: `valid`, and `place` if present."""
    return {name: images[name] for name in ("valid", "place") if name in images}
