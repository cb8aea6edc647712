"""Conversion table of LLaVA-OneVision checkpoints."""

from antgmm_jax.families.image_side import FILES, TEXT, image_weights
from antgmm_jax.families.llama import text_weights
from antgmm_jax.families.llava_onevision.config import LlavaOnevisionConfig
from antgmm_jax.families.table import Entry


def tensors(config: LlavaOnevisionConfig) -> list[Entry]:
    """Returns one entry for every tensor of the file (or for all layers of a stack)."""
    return [
        *image_weights(config.vision, config.bridge),
        Entry("image_newline", ("bridge/newline",), "e -> e"),
        *text_weights(config.language, TEXT, FILES.head),
    ]
