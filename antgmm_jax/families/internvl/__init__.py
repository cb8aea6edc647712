"""InternVL: InternViT on tiles, pixel shuffle with a two-layer MLP, and Qwen2 or Qwen3."""

from typing import Any

from antgmm_jax.families.base import Family
from antgmm_jax.families.common.image_side import ties, violations
from antgmm_jax.families.internvl.config import InternVLConfig, from_hf, to_hf
from antgmm_jax.families.internvl.model import build
from antgmm_jax.families.internvl.presets import PRESETS
from antgmm_jax.families.internvl.tiny import shapes
from antgmm_jax.families.internvl.weights import FILES, tensors


def _torch_ends(model: Any) -> tuple[Any, Any]:
    return model.model.multi_modal_projector, model.lm_head


FAMILY = Family(
    name="internvl",
    model_types=("internvl",),
    config=InternVLConfig,
    from_hf=from_hf,
    to_hf=to_hf,
    build=build,
    weights=tensors,
    files=FILES,
    ties=ties,
    violations=violations,
    image_readers=lambda config: ("bridge/merger/up",),
    torch_ends=_torch_ends,
    vllm=lambda config: "",
    tiny=shapes,
    presets=PRESETS,
)
