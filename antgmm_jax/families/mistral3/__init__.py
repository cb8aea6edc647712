"""Mistral 3: Pixtral's vision transformer, merger, Mistral or Ministral 3."""

from typing import Any

from antgmm_jax.families.base import Family
from antgmm_jax.families.mistral3.config import Mistral3Config, from_hf, ties, to_hf, violations
from antgmm_jax.families.mistral3.model import build
from antgmm_jax.families.mistral3.presets import PRESETS
from antgmm_jax.families.mistral3.tiny import shapes
from antgmm_jax.families.mistral3.weights import FILES, tensors


def _torch_ends(model: Any) -> tuple[Any, Any]:
    return model.model.multi_modal_projector, model.lm_head


FAMILY = Family(
    name="mistral3",
    model_types=("mistral3",),
    config=Mistral3Config,
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
