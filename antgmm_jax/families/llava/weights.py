"""Conversion table of LLaVA checkpoints."""

from antgmm_jax.families.common.image_side import FILES, TEXT, image_weights
from antgmm_jax.families.common.llama import text_weights
from antgmm_jax.families.common.table import Entry
from antgmm_jax.families.llava.config import LlavaConfig


def tensors(config: LlavaConfig) -> list[Entry]:
    """Returns one entry for every tensor of the file (or for all layers of a stack)."""
    return [*image_weights(config.vision, config.bridge), *text_weights(config.language, TEXT, FILES.head)]
