"""Several samples in one row of tokens: where each begins, and what it may see.

A packed batch has the names of a plain one with rows in the place of samples, and `segment_ids`: which of the row's
samples a position belongs to, from 1 on, 0 for none. The samples of a row lie side by side in the order of their
pictures (`pixel_values` [B, M, C, H, W] or `vision_features` [B, M, N, D]); a row may have fewer samples than M.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


def starts(segments: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Where the sample that each position belongs to begins."""
    begins = segments != jnp.pad(segments, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    return jax.lax.cummax(jnp.where(begins, jnp.arange(segments.shape[1]), 0), axis=1)


def positions(segments: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """The place of each position within its sample, from 0 on."""
    return jnp.arange(segments.shape[1]) - starts(segments)


def same_sample(segments: Int[Array, "B T"]) -> Bool[Array, "B 1 T T"]:
    """Which keys are of a query's own sample."""
    return (segments[:, :, None] == segments[:, None, :])[:, None]


def image_state(is_image: Bool[Array, "B T"], segments: Int[Array, "B T"], states: int) -> Int[Array, "B T"]:
    """Which of a row's image states, M pictures of `states` each, an image token stands for.

    Args:
        is_image: which tokens are image tokens; the n-th of a sample takes the n-th state of its picture.
        segments: the batch's `segment_ids`.
        states: image states of one picture.

    Returns:
        Indices into [M * states]; of other tokens any.
    """
    seen = jnp.cumsum(is_image, axis=1)
    before = jnp.take_along_axis(seen - is_image, starts(segments), axis=1)
    return jnp.maximum(segments - 1, 0) * states + jnp.clip(seen - before - 1, 0, states - 1)


def filled(batch: Mapping[str, Array]) -> Bool[Array, "S 1"]:
    """Which pictures of a batch belong to a sample: all, or those of a packed row's samples, row by row."""
    if "segment_ids" not in batch:
        return jnp.ones((batch["targets"].shape[0], 1), bool)
    pictures = batch["pixel_values" if "pixel_values" in batch else "vision_features"].shape[1]
    return (jnp.arange(pictures) < batch["segment_ids"].max(axis=1, keepdims=True)).reshape(-1, 1)
