"""Qwen3-VL: packed vision transformer, mergers with DeepStack, Qwen3."""

from typing import Any

from antgmm_jax.families.base import Family
from antgmm_jax.families.qwen3_vl.config import Qwen3VLConfig, from_hf, ties, to_hf, violations
from antgmm_jax.families.qwen3_vl.deepstack import DeepStack
from antgmm_jax.families.qwen3_vl.model import build
from antgmm_jax.families.qwen3_vl.presets import PRESETS
from antgmm_jax.families.qwen3_vl.tiny import shapes
from antgmm_jax.families.qwen3_vl.weights import FILES, tensors


def _torch_ends(model: Any) -> tuple[Any, Any]:
    return model.model.visual, model.lm_head


FAMILY = Family(
    name="qwen3_vl",
    model_types=("qwen3_vl",),
    config=Qwen3VLConfig,
    from_hf=from_hf,
    to_hf=to_hf,
    build=build,
    weights=tensors,
    files=FILES,
    ties=ties,
    violations=violations,
    image_readers=lambda config: ("bridge/merger/up", *(("bridge/deepstack/up",) if config.vision.taps else ())),
    depth=DeepStack(),
    torch_ends=_torch_ends,
    vllm=lambda config: "",
    tiny=shapes,
    presets=PRESETS,
)
