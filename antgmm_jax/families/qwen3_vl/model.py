"""Qwen3-VL, assembled from the common language model and its own image side."""

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float

from antgmm_jax.blocks.block import Gates
from antgmm_jax.blocks.grids import image_states
from antgmm_jax.blocks.language import Embedded
from antgmm_jax.blocks.packed import PackedEncoder
from antgmm_jax.blocks.pictures import Images, flat
from antgmm_jax.blocks.projector import OUT
from antgmm_jax.config import Remat, Tower
from antgmm_jax.families.common.qwen import QwenVL
from antgmm_jax.families.qwen3_vl.config import Qwen3VLConfig
from antgmm_jax.families.qwen3_vl.mergers import Mergers
from antgmm_jax.lmm import LMM, Batch, assemble


class Qwen3VL(QwenVL):
    """The whole model, with DeepStack."""

    bridge: Mergers

    def inputs(self, batch: Batch, gates: Gates, collect: Sequence[str] = ()) -> tuple[Embedded, dict[str, Array]]:
        """Embeds the prompt, with image states in place of the image tokens, and computes what DeepStack adds.

        What it adds is part of the bridge's output: the further tokens of each slot.
        """
        images, ids = batch["images"], batch["input_ids"]
        if images["valid"].shape[1] == 0:
            return super().inputs(batch, gates, collect)
        made: dict[str, Array] = {}
        if "vision_features" not in batch:
            features, made = self.vision_features(images, gates, collect)
            batch = {**batch, "vision_features": features}
        tokens, kept = super().inputs(batch, gates, collect)
        added, more = self.bridge.added(flat(batch["vision_features"]).astype(tokens.x.dtype), gates, collect)
        if added is not None:
            if OUT in kept:
                kept[OUT] = jnp.concatenate([kept[OUT], jnp.moveaxis(added, 0, 1)[None]], axis=2)
            is_image, at = image_states(ids, self.config.image_token, jnp.moveaxis(_by_row(added, images), 0, 2))
            added = jnp.moveaxis(jnp.where(is_image[..., None, None], at, 0), 2, 0)
        return tokens._replace(added=added), {**made, **kept, **more}


def _by_row(added: Float[Array, "K S E"], images: Images) -> Float[Array, "K B M E"]:
    """Reshapes what is added for each slot to rows of slots."""
    return added.reshape(len(added), *images["valid"].shape, -1)


def build(config: Qwen3VLConfig, *, remat: Remat) -> LMM:
    """Builds the model with new parameters; arguments as in `antgmm_jax.lmm.assemble`."""

    def bridge(stacks: Mapping[str, Tower]) -> Mergers:
        return Mergers(config, stacks["vision"], stacks["text"])

    return assemble(config, bridge, remat=remat, encoder=PackedEncoder, kind=Qwen3VL)
