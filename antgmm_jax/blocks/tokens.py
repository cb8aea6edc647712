"""Which tokens of a batch a tower processes."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool

from antgmm_jax.blocks.pictures import valid_slots
from antgmm_jax.config import Tower

IGNORE = -100
"""Label of a position that is no answer token."""


KINDS = {"images": ("vision",), "text": ("hidden", "vision"), "answers": ("hidden",)}
"""Kinds of tokens that a tower's states are compared on, by what the tower processes."""


def valid_tokens(tower: Tower, batch: Mapping[str, Any]) -> Bool[Array, "B N"]:
    """Which positions of a tower are tokens.

    Args:
        tower: a stack of the model.
        batch: a training batch.

    Returns:
        bool [B, N], of image towers [B * M, 1]: all positions of a slot are valid or none.
    """
    if tower.tokens == "images":
        return valid_slots(batch)
    if tower.tokens == "text":
        return batch["attention_mask"] > 0
    return batch["labels"] >= 0


def predicting(batch: Mapping[str, Any]) -> Bool[Array, "B N"]:
    """Positions of a decoder with an encoder before it that predict an answer token."""
    rows = jnp.arange(batch["targets"].shape[0])[:, None]
    none = jnp.zeros(batch["decoder_input_ids"].shape, bool)
    return none.at[rows, batch["positions"]].max(batch["targets"] != IGNORE)


def token_masks(tower: Tower, image_token: int, batch: Mapping[str, Any]) -> dict[str, Bool[Array, "B N"]]:
    """The tokens on which a tower's states are compared.

    Args:
        tower: a stack of the model.
        image_token: id of the placeholder token.
        batch: a training batch.

    Returns:
        Masks of the tower's `KINDS`: "hidden" are text tokens, "vision" image tokens.
    """
    if tower.tokens == "images":
        return {"vision": valid_slots(batch)}
    if tower.tokens == "answers":
        return {"hidden": predicting(batch)}
    valid, image = batch["attention_mask"] != 0, batch["input_ids"] == image_token
    return {"hidden": valid & ~image, "vision": valid & image}
