"""Spans of tokens that see one another, as those of an image, and windows of the last tokens."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


def numbered(marked: Bool[Array, "B T"]) -> Int[Array, "B T"]:
    """Numbers the runs of marked tokens of each row from 1; 0 for other tokens."""
    begins = marked & ~jnp.pad(marked, ((0, 0), (1, 0)))[:, :-1]
    return jnp.where(marked, jnp.cumsum(begins, axis=1), 0)


def visible(spans: Int[Array, "B T"], slots: int) -> Bool[Array, "B 1 T S"]:
    """Mask of the keys that each query sees: those up to its own, and all of its span.

    Args:
        spans: number of each query's span, 0 for none.
        slots: number of keys, of which the first T are those of the queries.

    Returns:
        The mask.
    """
    length = spans.shape[1]
    own = jnp.pad(spans, ((0, 0), (0, slots - length)))[:, None, :]
    causal = jnp.arange(slots)[None, None, :] <= jnp.arange(length)[None, :, None]
    return (causal | ((spans[:, :, None] == own) & (own > 0)))[:, None]


def within(queries: Int[Array, "B T"], keys: Int[Array, "B S"], window: int) -> Bool[Array, "B 1 T S"]:
    """Mask of the keys at the query's position, the `window` - 1 positions before it, or any after it."""
    return (keys[:, None, :] > queries[:, :, None] - window)[:, None]
