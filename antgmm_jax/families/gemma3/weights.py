"""Conversion table of Gemma 3 checkpoints."""

from itertools import chain

from antgmm_jax.families.base import Files
from antgmm_jax.families.common.image_side import HEAD, INNER, RENAMES, TEXT
from antgmm_jax.families.common.llama import text_weights
from antgmm_jax.families.common.table import Entry, norm
from antgmm_jax.families.common.vit import vision_weights
from antgmm_jax.families.gemma3.config import Gemma3Config

_VISION, _BRIDGE = "vision_tower.vision_model", "multi_modal_projector"

FILES = Files(
    head=HEAD,
    tokens=(f"{TEXT}.embed_tokens.weight",),
    renames=(*RENAMES, INNER),
    # Gemma 3 does not run SigLIP's head.
    ignored=(r".*position_ids", r".*rotary_emb\..*inv_freq", rf"{_VISION}\.head\..*"),
)
_NORMS = {
    "input_layernorm": "norm1",
    "post_attention_layernorm": "after1",
    "pre_feedforward_layernorm": "norm2",
    "post_feedforward_layernorm": "after2",
    "self_attn.q_norm": "attention/q_norm",
    "self_attn.k_norm": "attention/k_norm",
}


def tensors(config: Gemma3Config) -> list[Entry]:
    """Returns one entry for every tensor of the file (or for all layers of a stack)."""
    layer, ours = f"{TEXT}.layers.{{i}}", "language/decoder/blocks"
    llama = [entry for entry in text_weights(config.language, TEXT, HEAD) if "layernorm" not in entry.name]
    norms = [norm(f"{layer}.{name}", f"{ours}/{path}", "text", rms=True) for name, path in _NORMS.items()]
    return [
        *vision_weights(config.vision, _VISION),
        *norm(f"{_BRIDGE}.mm_soft_emb_norm", "bridge", rms=True),
        Entry(f"{_BRIDGE}.mm_input_projection_weight", ("bridge/kernel",), "v e -> v e"),
        *llama,
        *chain(*norms),
    ]
