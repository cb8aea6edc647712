"""Widths of batches for rows of uneven lengths."""

import numpy as np
from jaxtyping import Int

from data.collate import Needs

STEP = 8
"""Widths are multiples of this."""
SAVED = 0.15
"""A second width compiles a second program: it must save at least this part of the padded tokens."""


def bucket(lengths: Int[np.ndarray, " N"]) -> list[int]:
    """Returns the width besides the full one that saves most padding; [] if it saves too little.

    Args:
        lengths: columns that each row needs.
    """
    longest = int(lengths.max())
    widths = np.arange(STEP, longest, STEP)
    if not len(widths):
        return []
    within = (lengths[None] <= widths[:, None]).mean(axis=1)
    means = within * widths + (1 - within) * longest
    best = int(means.argmin())
    return [int(widths[best])] if means[best] <= (1 - SAVED) * longest else []


def buckets(needs: Needs, encoder_decoder: bool) -> dict[str, list[int]]:
    """Returns `buckets` and `prompt_buckets` of a recipe.

    Args:
        needs: columns that each row needs.
        encoder_decoder: whether an encoder reads the prompts.
    """
    if not encoder_decoder:
        return {"buckets": bucket(needs.text)}
    return {"buckets": bucket(needs.answer), "prompt_buckets": bucket(needs.text)}
