"""Masks of the tokens that a tower processes."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from antgmm_jax.blocks.pictures import valid_slots
from antgmm_jax.config import Tower

IGNORE = -100
"""Label of positions that are not answer tokens."""


def valid_tokens(tower: Tower, batch: Mapping[str, Any]) -> Bool[Array | np.ndarray, "B N"]:
    """Returns the mask of a tower's positions that are tokens, not padding.

    Args:
        tower: a stack of the model.
        batch: a training batch.

    Returns:
        bool [B, N]; for image towers [B * M, 1], as all positions of a slot are valid or none.
    """
    if tower.tokens == "images":
        return valid_slots(batch)
    if tower.tokens == "text":
        return batch["attention_mask"] > 0
    return batch["labels"] >= 0


def predicting(batch: Mapping[str, Any]) -> Bool[Array | np.ndarray, "B N"]:
    """Mask of the decoder positions that predict an answer token, in an encoder-decoder model."""
    rows = jnp.arange(batch["targets"].shape[0])[:, None]
    none = jnp.zeros(batch["decoder_input_ids"].shape, bool)
    return none.at[rows, batch["positions"]].max(batch["targets"] != IGNORE)


def compared_tokens(tower: Tower, image_token: int, batch: Mapping[str, Any]) -> Bool[Array | np.ndarray, "B N"]:
    """Returns the mask of the tokens on which a tower's states are compared: in the language model, those of text.

    Args:
        tower: a stack of the model.
        image_token: id of the image token.
        batch: a training batch.

    Returns:
        As in `valid_tokens`.
    """
    if tower.tokens == "images":
        return valid_slots(batch)
    if tower.tokens == "answers":
        return predicting(batch)
    return (batch["attention_mask"] != 0) & (batch["input_ids"] != image_token)
