"""Idefics3 and SmolVLM: SigLIP, pixel shuffle with one linear map, and Llama."""

from typing import Any

from antgmm_jax.families.base import Family
from antgmm_jax.families.idefics3.config import Idefics3Config, from_hf, ties, to_hf, violations
from antgmm_jax.families.idefics3.model import build
from antgmm_jax.families.idefics3.presets import PRESETS
from antgmm_jax.families.idefics3.tiny import shapes
from antgmm_jax.families.idefics3.weights import FILES, tensors


def _torch_ends(model: Any) -> tuple[Any, Any]:
    return model.model.connector, model.lm_head


def _vllm(config: Idefics3Config) -> str:
    needed = "its processor needs num2words, in vLLM as in transformers: `pip install num2words`"
    return needed if config.model_type == "smolvlm" else ""


FAMILY = Family(
    name="idefics3",
    model_types=("idefics3", "smolvlm"),
    config=Idefics3Config,
    from_hf=from_hf,
    to_hf=to_hf,
    build=build,
    weights=tensors,
    files=FILES,
    ties=ties,
    violations=violations,
    image_readers=lambda config: ("bridge/kernel",),
    torch_ends=_torch_ends,
    vllm=_vllm,
    tiny=shapes,
    presets=PRESETS,
)
