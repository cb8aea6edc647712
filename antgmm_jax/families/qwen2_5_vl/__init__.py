"""Qwen2.5-VL: packed vision transformer with windows, merger, Qwen2."""

from typing import Any

from antgmm_jax.families.base import Family
from antgmm_jax.families.common.local import LocalLayers
from antgmm_jax.families.qwen2_5_vl.config import Qwen25VLConfig, from_hf, ties, to_hf, violations
from antgmm_jax.families.qwen2_5_vl.model import build
from antgmm_jax.families.qwen2_5_vl.presets import PRESETS
from antgmm_jax.families.qwen2_5_vl.tiny import shapes
from antgmm_jax.families.qwen2_5_vl.weights import FILES, tensors


def _torch_ends(model: Any) -> tuple[Any, Any]:
    return model.model.visual, model.lm_head


FAMILY = Family(
    name="qwen2_5_vl",
    model_types=("qwen2_5_vl",),
    config=Qwen25VLConfig,
    from_hf=from_hf,
    to_hf=to_hf,
    build=build,
    weights=tensors,
    files=FILES,
    ties=ties,
    violations=violations,
    image_readers=lambda config: ("bridge/merger/up",),
    depth=LocalLayers("vision"),
    torch_ends=_torch_ends,
    vllm=lambda config: "",
    tiny=shapes,
    presets=PRESETS,
)
