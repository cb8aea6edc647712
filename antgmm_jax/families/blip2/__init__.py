"""BLIP-2: ViT, Q-Former, and T5 or OPT."""

from typing import Any

from antgmm_jax.families.base import Family
from antgmm_jax.families.blip2.config import Blip2Config, from_hf, ties, to_hf, violations
from antgmm_jax.families.blip2.frequency import Frequency
from antgmm_jax.families.blip2.image import blank
from antgmm_jax.families.blip2.model import build
from antgmm_jax.families.blip2.presets import PRESETS
from antgmm_jax.families.blip2.tiny import shapes
from antgmm_jax.families.blip2.weights import tensors
from antgmm_jax.families.common.languages import FILES


def _torch_ends(model: Any) -> tuple[Any, Any]:
    return model.language_projection, model.language_model.lm_head


FAMILY = Family(
    name="blip2",
    model_types=("blip-2",),
    config=Blip2Config,
    from_hf=from_hf,
    to_hf=to_hf,
    build=build,
    weights=tensors,
    files=FILES,
    ties=ties,
    violations=violations,
    image_readers=lambda config: tuple(f"bridge/stack/cross/attention/{name}" for name in "kv"),
    features=("vision", "bridge/queries", "bridge/norm", "bridge/stack"),
    depth=Frequency(),
    torch_ends=_torch_ends,
    without_images=blank,
    vllm=lambda config: None if config.encoder_decoder else "",
    tiny=shapes,
    presets=PRESETS,
)
