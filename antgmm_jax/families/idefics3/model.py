"""Idefics3 and SmolVLM: the common parts and the pixel shuffle."""

from collections.abc import Mapping, Sequence

from flax import nnx
from jaxtyping import Array, Float

from antgmm_jax.blocks.block import Gates
from antgmm_jax.blocks.layers import linear
from antgmm_jax.blocks.merger import squares
from antgmm_jax.blocks.parameters import param
from antgmm_jax.blocks.projector import OUT
from antgmm_jax.config import Remat, Tower
from antgmm_jax.families.idefics3.config import Idefics3Config, ShuffleConfig
from antgmm_jax.lmm import LMM, assemble


class PixelShuffle(nnx.Module):
    """Concatenates each square of neighbouring image states and maps it to the text width."""

    def __init__(self, config: ShuffleConfig, vision: Tower, text: Tower):
        self.scale, inside = config.scale, config.scale**2
        wide = vision.stack.embed
        axes, shape = ("shuffled", vision.embed, text.embed), (inside, wide, text.stack.embed)
        self.kernel = param(shape, axes, scale=(inside * wide) ** -0.5, over=OUT)

    def features(
        self, vision: Float[Array, "S N V"], gates: Gates, collect: Sequence[str] = ()
    ) -> tuple[Float[Array, "S N V"], dict[str, Array]]:
        """Returns the image states unchanged: there is no stack."""
        return vision, {}

    def project(
        self, features: Float[Array, "S N V"], gates: Gates, collect: Sequence[str] = ()
    ) -> tuple[Float[Array, "S Q E"], dict[str, Array]]:
        """Maps image states to Q = N / scale ** 2 text embeddings."""
        return linear(squares(features, self.scale), self.kernel[...], None, inputs=2), {}


def build(config: Idefics3Config, *, remat: Remat) -> LMM:
    """Builds the model; see `antgmm_jax.lmm.assemble`."""

    def bridge(stacks: Mapping[str, Tower]) -> PixelShuffle:
        return PixelShuffle(config.bridge, stacks["vision"], stacks["text"])

    return assemble(config, bridge, remat=remat)
