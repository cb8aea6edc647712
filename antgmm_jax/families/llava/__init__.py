"""LLaVA: CLIP or SigLIP, a two-layer MLP and Llama, Mistral, Qwen2 or Qwen3."""

from typing import Any

from antgmm_jax.families.base import Family
from antgmm_jax.families.common.image_side import FILES, ties, violations
from antgmm_jax.families.llava.config import LlavaConfig, from_hf, to_hf
from antgmm_jax.families.llava.model import build
from antgmm_jax.families.llava.presets import PRESETS
from antgmm_jax.families.llava.tiny import shapes
from antgmm_jax.families.llava.weights import tensors


def _torch_ends(model: Any) -> tuple[Any, Any]:
    return model.model.multi_modal_projector, model.lm_head


FAMILY = Family(
    name="llava",
    model_types=("llava",),
    config=LlavaConfig,
    from_hf=from_hf,
    to_hf=to_hf,
    build=build,
    weights=tensors,
    files=FILES,
    ties=ties,
    violations=violations,
    image_readers=lambda config: ("bridge/up",),
    torch_ends=_torch_ends,
    vllm=lambda config: "",
    tiny=shapes,
    presets=PRESETS,
)
