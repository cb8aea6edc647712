"""Several samples in one row of tokens: where each begins, and what it may see.

A packed batch has the names of a plain one with rows in the place of samples, and `segment_ids`: which of the row's
samples a position belongs to, from 1 on, 0 for none. The samples of a row lie side by side in the order of their
pictures.
"""

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
