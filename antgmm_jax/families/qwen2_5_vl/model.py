"""Qwen2.5-VL, assembled from the common language model and a packed image encoder."""

from collections.abc import Mapping

from antgmm_jax.blocks.merger import SquareMerger
from antgmm_jax.blocks.packed import PackedEncoder
from antgmm_jax.config import Remat, Tower
from antgmm_jax.families.common.qwen import QwenVL
from antgmm_jax.families.qwen2_5_vl.config import Qwen25VLConfig
from antgmm_jax.lmm import LMM, assemble


def build(config: Qwen25VLConfig, *, remat: Remat) -> LMM:
    """Builds the model with new parameters; arguments as in `antgmm_jax.lmm.assemble`."""

    def bridge(stacks: Mapping[str, Tower]) -> SquareMerger:
        return SquareMerger(config, stacks["vision"], stacks["text"])

    return assemble(config, bridge, remat=remat, encoder=PackedEncoder, kind=QwenVL)
