"""BLIP-2 with T5: the common parts and the Q-Former."""

from collections.abc import Mapping, Sequence

from flax import nnx
from jaxtyping import Array, Float

from antgmm_jax.blocks.block import Context, Gates
from antgmm_jax.blocks.layers import Norm, linear, repeated
from antgmm_jax.blocks.parameters import param
from antgmm_jax.blocks.projector import OUT
from antgmm_jax.blocks.stack import Stack
from antgmm_jax.config import Remat, Tower
from antgmm_jax.families.blip2.config import Blip2Config
from antgmm_jax.families.blip2.image import QFormerConfig
from antgmm_jax.lmm import LMM, assemble


class QFormer(nnx.Module):
    """A stack of learnt queries with cross-attention to image states, then a linear map to the text width."""

    def __init__(self, config: QFormerConfig, tower: Tower, memory: int, text: int, *, remat: Remat = "dots"):
        width = config.stack.embed
        self.queries = param((config.queries, width), ("queries", tower.embed), scale=0.02)
        self.norm = Norm(config.stack, tower.embed)
        self.stack = Stack(tower, memory=memory, remat=remat)
        axes = (tower.embed, "text/embed")
        self.out = param((width, text), axes, scale=width**-0.5, over=OUT)
        self.out_bias = param((text,), axes[1:])

    def features(
        self, vision: Float[Array, "S N V"], gates: Gates, collect: Sequence[str] = ()
    ) -> tuple[Float[Array, "S Q D"], dict[str, Array]]:
        """Returns query states after the stack, and the intermediates named in `collect`."""
        x = repeated(self.norm(self.queries[...], gates.get("bridge/embed")), vision.shape[0])
        return self.stack(x, Context(memory=vision), gates, collect)

    def project(
        self, features: Float[Array, "S Q D"], gates: Gates, collect: Sequence[str] = ()
    ) -> tuple[Float[Array, "S Q E"], dict[str, Array]]:
        """Maps query states to text embeddings; the stack's last norm has applied the width gate already."""
        return linear(features, self.out[...], self.out_bias[...]), {}


def build(config: Blip2Config, *, remat: Remat) -> LMM:
    """Builds the model; see `antgmm_jax.lmm.assemble`."""
    vision, text = config.vision.stack.embed, config.language.decoder.embed

    def bridge(stacks: Mapping[str, Tower]) -> QFormer:
        return QFormer(config.bridge, stacks["bridge"], vision, text, remat=remat)

    return assemble(config, bridge, remat=remat)
