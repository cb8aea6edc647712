"""Gemma 3: the common parts, averages of squares of image states, and images that their own tokens see whole."""

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from antgmm_jax.blocks import spans
from antgmm_jax.blocks.block import Gates
from antgmm_jax.blocks.language import Embedded
from antgmm_jax.blocks.layers import linear, normed, plus_one
from antgmm_jax.blocks.parameters import param
from antgmm_jax.blocks.projector import OUT
from antgmm_jax.config import Remat, Tower
from antgmm_jax.families.gemma3.config import Gemma3Config, PoolConfig
from antgmm_jax.lmm import LMM, Batch, assemble


class Pool(nnx.Module):
    """Averages squares of image states, normalises the averages and maps them to the text width."""

    def __init__(self, config: PoolConfig, vision: Tower, text: Tower):
        self.side, self.eps = config.side, vision.stack.eps
        wide, narrow = vision.stack.embed, text.stack.embed
        self.scale = param((wide,), (vision.embed,))
        self.kernel = param((wide, narrow), (vision.embed, text.embed), scale=wide**-0.5, over=OUT)

    def features(
        self, vision: Float[Array, "S N V"], gates: Gates, collect: Sequence[str] = ()
    ) -> tuple[Float[Array, "S Q V"], dict[str, Array]]:
        """Returns Q = side ** 2 averages of each image's states."""
        along = round(vision.shape[1] ** 0.5) // self.side
        squares = rearrange(vision, "s (gy y gx x) d -> s (gy gx) (y x) d", gy=self.side, y=along, x=along)
        return squares.astype(jnp.float32).mean(axis=2).astype(vision.dtype), {}

    def project(
        self, features: Float[Array, "S Q V"], gates: Gates, collect: Sequence[str] = ()
    ) -> tuple[Float[Array, "S Q E"], dict[str, Array]]:
        """Maps averages to text embeddings."""
        scale, gate = plus_one(self.scale[...]), gates.get("vision/embed")
        return linear(normed(features, scale, None, eps=self.eps, rms=True, gate=gate), self.kernel[...], None), {}


class Gemma3(LMM):
    """The whole model; tokens of an image see one another."""

    def inputs(self, batch: Batch, gates: Gates, collect: Sequence[str] = ()) -> tuple[Embedded, dict[str, Array]]:
        """Embeds the prompt, with image states in place of the image tokens, and numbers the images."""
        tokens, kept = super().inputs(batch, gates, collect)
        is_image = (batch["input_ids"] == self.config.image_token) & batch["attention_mask"].astype(bool)
        return tokens._replace(spans=spans.numbered(is_image)), kept


def build(config: Gemma3Config, *, remat: Remat) -> LMM:
    """Builds the model; see `antgmm_jax.lmm.assemble`."""

    def bridge(stacks: Mapping[str, Tower]) -> Pool:
        return Pool(config.bridge, stacks["vision"], stacks["text"])

    return assemble(config, bridge, remat=remat, kind=Gemma3)
