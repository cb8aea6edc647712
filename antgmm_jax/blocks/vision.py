"""The image encoder: a vision transformer on square images."""

from collections.abc import Sequence

import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from antgmm_jax.blocks.block import Context, Gates
from antgmm_jax.blocks.layers import Norm, gated, linear, plus, repeated
from antgmm_jax.blocks.parameters import param
from antgmm_jax.blocks.pictures import Images, flat, normalised
from antgmm_jax.blocks.stack import Stack
from antgmm_jax.config import Remat, Tower, VisionConfig


class VisionEncoder(nnx.Module):
    """A vision transformer: patches, an optional class token, learnt positions and a stack."""

    def __init__(self, config: VisionConfig, tower: Tower, *, remat: Remat = "dots"):
        self.config, width = config, config.stack.embed
        fan_in = config.channels * config.patch**2
        shape = (config.channels, config.patch, config.patch, width)
        axes, along = (tower.embed,), ("channels", "patch_y", "patch_x")
        self.patch = param(shape, along + axes, scale=fan_in**-0.5, over="vision/patches")
        self.patch_bias = param((width,), axes) if config.patch_bias else None
        self.cls = param((width,), axes, scale=0.02) if config.has_cls else None
        self.positions = param((config.tokens, width), ("positions", *axes), scale=0.02)
        self.first_norm = Norm(config.stack, axes[0]) if config.first_norm else None
        self.stack = Stack(tower, remat=remat)
        self.final_norm = Norm(config.stack, axes[0]) if config.has_final_norm else None

    def __call__(
        self, images: Images, gates: Gates, collect: Sequence[str] = ()
    ) -> tuple[Float[Array, "S N D"], dict[str, Array]]:
        """Encodes images.

        Args:
            images: square images as for `normalised`: B rows of M slots, S = B * M.
            gates: axis name -> gate.
            collect: names of the intermediates to return.

        Returns:
            Token states for the bridge, and the intermediates.
        """
        gate, p = gates.get("vision/embed"), self.config.patch
        pixels = normalised(images).astype(self.patch[...].dtype)
        whole = pixels.shape[1] // p * p  # what is left of a patch at the right and bottom edges is not read
        pixels = pixels[:, :whole, :whole]
        patches = rearrange(pixels, "s (gy y) (gx x) c -> s (gy gx) c y x", y=p, x=p)
        x = linear(patches, self.patch[...], None if self.patch_bias is None else self.patch_bias[...], inputs=3)
        if self.cls is not None:
            x = jnp.concatenate([repeated(self.cls[...][None], x.shape[0]), x], axis=1)
        x = plus(x, self.positions[...])
        if self.first_norm is not None:
            x = self.first_norm(x, gate)
        x, kept = self.stack(x, Context(valid=flat(images["valid"])[:, None]), gates, collect)
        norm = self.final_norm if self.config.final_norm else None
        x = gated(x, gate) if norm is None else norm(x, gate)  # without a norm, the bridge reads the stream itself
        return (x if self.cls is None or self.config.keep_cls else x[:, 1:]), kept
