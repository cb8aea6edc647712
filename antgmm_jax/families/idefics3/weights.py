"""Conversion table of Idefics3 and SmolVLM checkpoints."""

from antgmm_jax.families.base import Files
from antgmm_jax.families.common.llama import text_weights
from antgmm_jax.families.common.table import Entry
from antgmm_jax.families.common.vit import vision_weights
from antgmm_jax.families.idefics3.config import Idefics3Config

FILES = Files(
    head="lm_head.weight",
    tokens=("model.text_model.embed_tokens.weight",),
    ignored=(r".*position_ids", r".*rotary_emb\.inv_freq"),
)


def tensors(config: Idefics3Config) -> list[Entry]:
    """Returns one entry for every tensor of the file (or for all layers of a stack)."""
    proj, squares = "model.connector.modality_projection.proj.weight", "e (s d) -> s d e"
    return [
        *vision_weights(config.vision, "model.vision_model"),
        Entry(proj, ("bridge/kernel",), squares),
        *text_weights(config.language, "model.text_model", FILES.head),
    ]
