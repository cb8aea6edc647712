"""Conversion table of LLaVA checkpoints."""

import re

from antgmm_jax.config import LMMConfig
from antgmm_jax.families.base import Files
from antgmm_jax.families.llama import text_weights
from antgmm_jax.families.llava.config import LlavaConfig
from antgmm_jax.families.table import Entry, dense, norm
from antgmm_jax.families.vit import vision_weights

# Tensor names differ between transformers 5.x and older releases; ours are those that vLLM needs.
_RENAMES = (
    (r"^model\.vision_tower\.", "vision_tower."),
    (r"^model\.multi_modal_projector\.", "multi_modal_projector."),
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model."),
)
_VISION = "vision_tower.vision_model"
_LAYER = re.compile(r"vision_tower\.vision_model\.encoder\.layers\.(\d+)\.")


def _unread(config: LMMConfig, name: str) -> bool:
    """Whether a tensor belongs to a layer after the one that the projector reads: stored, but never run."""
    layer = _LAYER.match(name)
    return layer is not None and int(layer[1]) >= config.vision.stack.layers


FILES = Files(
    head="language_model.lm_head.weight",
    tokens=("language_model.model.embed_tokens.weight",),
    renames=_RENAMES,
    ignored=(r".*position_ids", r".*rotary_emb\.inv_freq"),
    unread=_unread,
)


def tensors(config: LlavaConfig) -> list[Entry]:
    """Returns one entry for every tensor of the file (or for all layers of a stack)."""
    up_bias, down_bias = ("bridge/up_bias", "bridge/down_bias") if config.bridge.bias else (None, None)
    return [
        Entry(f"{_VISION}.embeddings.class_embedding", ("vision/cls",), "d -> d"),
        *norm(f"{_VISION}.pre_layrnorm", "vision/first_norm"),
        *vision_weights(config.vision, _VISION),
        *dense("multi_modal_projector.linear_1", "bridge/up", up_bias, "m e -> e m"),
        *dense("multi_modal_projector.linear_2", "bridge/down", down_bias, "e m -> m e"),
        *text_weights(config.language, "language_model.model", FILES.head),
    ]
