"""Gemma 3: SigLIP, averages of squares with one linear map, and a decoder of local and global layers."""

from typing import Any

from antgmm_jax.families.base import Family
from antgmm_jax.families.common.local import LocalLayers
from antgmm_jax.families.gemma3.config import Gemma3Config, from_hf, ties, to_hf, violations
from antgmm_jax.families.gemma3.model import build
from antgmm_jax.families.gemma3.presets import PRESETS
from antgmm_jax.families.gemma3.tiny import shapes
from antgmm_jax.families.gemma3.weights import FILES, tensors


def _torch_ends(model: Any) -> tuple[Any, Any]:
    return model.model.multi_modal_projector, model.lm_head


FAMILY = Family(
    name="gemma3",
    model_types=("gemma3",),
    config=Gemma3Config,
    from_hf=from_hf,
    to_hf=to_hf,
    build=build,
    weights=tensors,
    files=FILES,
    ties=ties,
    violations=violations,
    image_readers=lambda config: (),
    depth=LocalLayers("text"),
    torch_ends=_torch_ends,
    vllm=lambda config: "its build for CPUs gives other answers to images",
    tiny=shapes,
    presets=PRESETS,
)
