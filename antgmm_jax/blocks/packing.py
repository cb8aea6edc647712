"""Positions and attention masks of packed rows: several samples in one row of tokens.

A packed batch has the keys of an ordinary one, with rows instead of samples, and `segment_ids`: the number of each
position's sample within its row, from 1; 0 for padding. Samples and their images have the same order.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


def starts(segments: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """First position of the sample to which each position belongs."""
    begins = segments != jnp.pad(segments, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    return jax.lax.cummax(jnp.where(begins, jnp.arange(segments.shape[1])[None], 0), axis=1)


def positions(segments: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Index of each position within its sample, from 0."""
    return jnp.arange(segments.shape[1])[None] - starts(segments)


def same_sample(queries: Int[Array, "B T"], keys: Int[Array, "B S"]) -> Bool[Array, "B 1 T S"]:
    """Mask of the keys whose segment is that of the query."""
    return (queries[:, :, None] == keys[:, None, :])[:, None]
