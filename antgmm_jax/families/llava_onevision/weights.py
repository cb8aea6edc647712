"""Conversion table of LLaVA-OneVision checkpoints."""

from antgmm_jax.families.common.image_side import FILES, TEXT, image_weights
from antgmm_jax.families.common.llama import text_weights
from antgmm_jax.families.common.table import Entry
from antgmm_jax.families.llava_onevision.config import LlavaOnevisionConfig


def tensors(config: LlavaOnevisionConfig) -> list[Entry]:
    """Returns one entry for every tensor of the file (or for all layers of a stack)."""
    return [
        *image_weights(config.vision, config.bridge),
        Entry("image_newline", ("bridge/newline",), "e -> e"),
        *text_weights(config.language, TEXT, FILES.head),
    ]
