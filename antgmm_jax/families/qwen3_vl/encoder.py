"""The image encoder of Qwen3-VL, for packed images of any size."""

from collections.abc import Sequence

import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from antgmm_jax.blocks.block import Context, Gates
from antgmm_jax.blocks.grids import image_of_slot, interpolated
from antgmm_jax.blocks.layers import linear, param
from antgmm_jax.blocks.packing import same_sample
from antgmm_jax.blocks.pictures import Images, normalised
from antgmm_jax.blocks.rope import axial
from antgmm_jax.blocks.stack import Stack
from antgmm_jax.config import Remat, Tower
from antgmm_jax.families.qwen3_vl.config import PackedVisionConfig


class PackedEncoder(nnx.Module):
    """A vision transformer over all patches of a row; each attends to the patches of its own image."""

    def __init__(self, config: PackedVisionConfig, tower: Tower, *, remat: Remat = "dots", rngs: nnx.Rngs):
        self.config, width = config, config.stack.embed
        shape = (config.channels, config.frames, config.patch, config.patch, width)
        axes = ("channels", "frames", "patch_y", "patch_x", tower.embed)
        fan_in = config.channels * config.frames * config.patch**2
        self.patch = param(rngs.params(), shape, axes, scale=fan_in**-0.5, over="vision/patches")
        self.patch_bias = param(rngs.params(), (width,), axes[-1:], scale=None)
        self.positions = param(rngs.params(), (config.entries, width), ("positions", *axes[-1:]), scale=0.02)
        self.stack = Stack(tower, remat=remat, rngs=rngs)

    def __call__(
        self, images: Images, gates: Gates, collect: Sequence[str] = ()
    ) -> tuple[Float[Array, "S N D"], dict[str, Array]]:
        """Encodes the squares of images.

        Args:
            images: `pixels` [B, M, merge * patch, merge * patch, C] as in `normalised`, `valid` and `place`.
            gates: axis name -> gate.
            collect: names of the intermediates to return.

        Returns:
            States of each slot's patches (the last ones, then those that DeepStack reads), and the intermediates.
        """
        config, (rows, slots) = self.config, images["valid"].shape
        side, inside = config.merge, config.merge**2
        squares = normalised(images).astype(self.patch[...].dtype)
        patches = rearrange(squares, "s (gy y) (gx x) c -> s (gy gx) c 1 y x", gy=side, gx=side)
        # As in transformers, an image fills every frame of a patch.
        x = linear(jnp.repeat(patches, config.frames, axis=3), self.patch[...], self.patch_bias[...], inputs=4)
        x = x.reshape(rows, slots * inside, -1)
        place = jnp.repeat(images["place"], inside, axis=1)
        inner = jnp.tile(jnp.arange(inside), slots)[None]
        at = (side * place[..., 0] + inner // side, side * place[..., 1] + inner % side)
        learnt = interpolated(self.positions[...], *at, side * place[..., 2:])
        x = (x.astype(jnp.float32) + learnt).astype(x.dtype)
        context = Context(
            mask=same_sample(jnp.repeat(image_of_slot(images), inside, axis=1)),
            positions=axial(*at, config.stack.head_dim, config.stack.rope_theta),
            valid=jnp.repeat(images["valid"], inside, axis=1),
        )
        x, kept = self.stack(x, context, gates, collect, taps=config.reached)
        states = [x, *kept.pop("vision/taps", ())]
        by_slot = [state.reshape(rows * slots, inside, -1) for state in states]
        if "vision/states" in kept:
            kept["vision/states"] = kept["vision/states"].reshape(-1, *by_slot[0].shape)
        return jnp.concatenate(by_slot, axis=1), kept
