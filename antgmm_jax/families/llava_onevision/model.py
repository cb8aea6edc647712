"""LLaVA-OneVision: the common parts, a projector with a newline vector, and states of tiles at image tokens."""

from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from antgmm_jax.blocks.parameters import param
from antgmm_jax.blocks.projector import Projector, ProjectorConfig
from antgmm_jax.config import Remat, Tower
from antgmm_jax.families.llava_onevision.config import LlavaOnevisionConfig
from antgmm_jax.families.llava_onevision.tiles import sources
from antgmm_jax.lmm import LMM, Batch, assemble


class NewlineProjector(Projector):
    """A projector, and the embedding of the end of a row of image tokens."""

    def __init__(self, config: ProjectorConfig, vision: Tower, text: Tower):
        super().__init__(config, vision, text)
        width = text.stack.embed
        self.newline = param((width,), (text.embed,), scale=width**-0.5)


class LlavaOnevision(LMM):
    """The whole model; image tokens take interpolated states of an image's tiles, row by row."""

    config: LlavaOnevisionConfig
    bridge: NewlineProjector

    def at_tokens(
        self, states: Float[Array, "B N E"], batch: Batch
    ) -> tuple[Bool[Array, "B T"], Float[Array, "B T E"]]:
        """Returns which tokens are image tokens, and their states."""
        is_image = batch["input_ids"] == self.config.image_token
        order = jnp.cumsum(is_image, axis=1) - 1
        taps, newline = sources(order, batch["images"]["place"], self.config.patches_per_side)
        at = jnp.zeros((*order.shape, states.shape[-1]), jnp.float32)
        for patch, weight in taps:
            own = jnp.take_along_axis(states, jnp.clip(patch, 0, states.shape[1] - 1)[..., None], axis=1)
            at = at + weight[..., None] * own.astype(jnp.float32)
        end = self.bridge.newline[...].astype(jnp.float32)[None, None]
        return is_image, jnp.where(newline[..., None], end, at).astype(states.dtype)


def build(config: LlavaOnevisionConfig, *, remat: Remat) -> LMM:
    """Builds the model; see `antgmm_jax.lmm.assemble`."""

    def bridge(stacks: Mapping[str, Tower]) -> NewlineProjector:
        return NewlineProjector(config.bridge, stacks["vision"], stacks["text"])

    return assemble(config, bridge, remat=remat, kind=LlavaOnevision)
