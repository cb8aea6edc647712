"""Mistral 3, assembled from the common language model and a packed image encoder."""

from collections.abc import Mapping

from antgmm_jax.blocks.packed import PackedEncoder
from antgmm_jax.config import Remat, Tower
from antgmm_jax.families.mistral3.bridge import Mistral3Bridge
from antgmm_jax.families.mistral3.config import Mistral3Config
from antgmm_jax.lmm import LMM, assemble


def build(config: Mistral3Config, *, remat: Remat) -> LMM:
    """Builds the model with new parameters; arguments as in `antgmm_jax.lmm.assemble`."""

    def bridge(stacks: Mapping[str, Tower]) -> Mistral3Bridge:
        return Mistral3Bridge(config, stacks["vision"], stacks["text"])

    return assemble(config, bridge, remat=remat, encoder=PackedEncoder)
