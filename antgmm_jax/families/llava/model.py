"""LLaVA assembled from the common parts."""

from flax import nnx

from antgmm_jax.blocks.language import LanguageModel
from antgmm_jax.blocks.projector import Projector
from antgmm_jax.blocks.vision import VisionEncoder
from antgmm_jax.config import Remat, towers
from antgmm_jax.families.llava.config import LlavaConfig
from antgmm_jax.lmm import LMM


def build(config: LlavaConfig, *, remat: Remat, rngs: nnx.Rngs) -> LMM:
    """The model with new parameters.

    Args:
        config: the model.
        remat: what its stacks keep for the backward pass.
        rngs: source of its parameters.

    Returns:
        The module.
    """
    stacks = towers(config)
    vision = VisionEncoder(config.vision, stacks["vision"], remat=remat, rngs=rngs)
    bridge = Projector(config.bridge, stacks["vision"], stacks["text"], rngs=rngs)
    return LMM(config, vision, bridge, LanguageModel(config.language, stacks, remat=remat, rngs=rngs))
