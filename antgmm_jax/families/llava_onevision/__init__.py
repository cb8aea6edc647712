"""LLaVA-OneVision: SigLIP on tiles of any resolution, a two-layer MLP with a newline vector, and Qwen2."""

from typing import Any

from antgmm_jax.families.base import Family
from antgmm_jax.families.common.image_side import FILES, ties, violations
from antgmm_jax.families.llava_onevision.config import LlavaOnevisionConfig, from_hf, to_hf
from antgmm_jax.families.llava_onevision.model import build
from antgmm_jax.families.llava_onevision.presets import PRESETS
from antgmm_jax.families.llava_onevision.tiles import tokens
from antgmm_jax.families.llava_onevision.tiny import shapes
from antgmm_jax.families.llava_onevision.weights import tensors


def _torch_ends(model: Any) -> tuple[Any, Any]:
    return model.model.multi_modal_projector, model.lm_head


def _vllm(config: LlavaOnevisionConfig) -> str:
    # Its number of tokens of a picture has a constant 9 in place of the config's number.
    tiles = f"; it counts the tokens of large pictures as for 9 tiles, and this model reads {config.most_tiles}"
    return "one image per conversation" + (tiles if config.most_tiles != 9 else "")


FAMILY = Family(
    name="llava_onevision",
    model_types=("llava_onevision",),
    config=LlavaOnevisionConfig,
    from_hf=from_hf,
    to_hf=to_hf,
    build=build,
    weights=tensors,
    files=FILES,
    ties=ties,
    violations=violations,
    image_readers=lambda config: ("bridge/up",),
    image_tokens=lambda config, images: tokens(images["place"]),
    torch_ends=_torch_ends,
    vllm=_vllm,
    tiny=shapes,
    presets=PRESETS,
)
