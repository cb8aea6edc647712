"""InstructBLIP: ViT, a Q-Former that reads the instruction, and T5 or Llama."""

from typing import Any

import numpy as np

from antgmm_jax.families.base import Family
from antgmm_jax.families.blip2.frequency import Frequency
from antgmm_jax.families.blip2.image import blank
from antgmm_jax.families.common.languages import FILES
from antgmm_jax.families.instructblip.config import InstructBlipConfig, from_hf, ties, to_hf, violations
from antgmm_jax.families.instructblip.model import build
from antgmm_jax.families.instructblip.presets import PRESETS
from antgmm_jax.families.instructblip.tiny import shapes
from antgmm_jax.families.instructblip.weights import tensors


def _torch_ends(model: Any) -> tuple[Any, Any]:
    return model.language_projection, model.language_model.lm_head


def _without_images(config: Any) -> dict[str, np.ndarray]:
    """A black picture, and an instruction of padding alone."""
    padding = np.zeros((1, 1), np.int64)
    return {**blank(config), "qformer_input_ids": padding, "qformer_attention_mask": padding}


FAMILY = Family(
    name="instructblip",
    model_types=("instructblip",),
    config=InstructBlipConfig,
    from_hf=from_hf,
    to_hf=to_hf,
    build=build,
    weights=tensors,
    files=FILES,
    ties=ties,
    violations=violations,
    image_readers=lambda config: tuple(f"bridge/stack/cross/attention/{name}" for name in "kv"),
    features=("vision", "bridge/queries", "bridge/words", "bridge/positions", "bridge/norm", "bridge/stack"),
    depth=Frequency(),
    torch_ends=_torch_ends,
    without_images=_without_images,
    tiny=shapes,
    presets=PRESETS,
)
