"""Conversion table of LLaVA checkpoints."""

from antgmm_jax.families.image_side import FILES, TEXT, image_weights
from antgmm_jax.families.llama import text_weights
from antgmm_jax.families.llava.config import LlavaConfig
from antgmm_jax.families.table import Entry


def tensors(config: LlavaConfig) -> list[Entry]:
    """Returns one entry for every tensor of the file (or for all layers of a stack)."""
    return [*image_weights(config.vision, config.bridge), *text_weights(config.language, TEXT, FILES.head)]
