"""LLaVA: the common parts and a projector."""

from collections.abc import Mapping

from antgmm_jax.blocks.projector import Projector
from antgmm_jax.config import Remat, Tower
from antgmm_jax.families.llava.config import LlavaConfig
from antgmm_jax.lmm import LMM, assemble


def build(config: LlavaConfig, *, remat: Remat) -> LMM:
    """Builds the model; see `antgmm_jax.lmm.assemble`."""

    def bridge(stacks: Mapping[str, Tower]) -> Projector:
        return Projector(config.bridge, stacks["vision"], stacks["text"])

    return assemble(config, bridge, remat=remat)
