"""LLaVA: the common parts and a projector."""

from collections.abc import Mapping

from flax import nnx

from antgmm_jax.blocks.projector import Projector
from antgmm_jax.config import Remat, Tower
from antgmm_jax.families.llava.config import LlavaConfig
from antgmm_jax.lmm import LMM, assemble


def build(config: LlavaConfig, *, remat: Remat, rngs: nnx.Rngs) -> LMM:
    """Builds the model with new parameters; see `antgmm_jax.lmm.assemble`."""

    def bridge(stacks: Mapping[str, Tower], rngs: nnx.Rngs) -> Projector:
        return Projector(config.bridge, stacks["vision"], stacks["text"], rngs=rngs)

    return assemble(config, bridge, remat=remat, rngs=rngs)
