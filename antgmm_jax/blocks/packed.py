"""An image encoder for packed images of any size."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Int

from antgmm_jax.axes import part
from antgmm_jax.blocks.block import Context, Gates
from antgmm_jax.blocks.grids import by_window, image_of_slot, interpolated, reordered
from antgmm_jax.blocks.layers import Norm, linear
from antgmm_jax.blocks.parameters import param
from antgmm_jax.blocks.pictures import Images, normalised
from antgmm_jax.blocks.projector import ProjectorConfig
from antgmm_jax.blocks.rope import axial
from antgmm_jax.blocks.stack import Stack
from antgmm_jax.blocks.windows import Windows
from antgmm_jax.config import LMMConfig, Remat, Tower, VisionConfig


@dataclass(frozen=True, kw_only=True)
class PackedVisionConfig(VisionConfig):
    """A vision transformer over the patches of all images of a row.

    Squares of `merge` by `merge` patches share a text position. A patch spans `frames` frames, in which an image is
    repeated. `image` is the side of an image of the usual size. `entries` is the number of learned positions, 0 for
    none; `alternating` says how rows and columns divide the rotary frequencies (`antgmm_jax.blocks.rope.axial`).
    `window` is the side in squares of the windows in which the stack's local layers attend. The residual stream after
    the layers `taps` is also handed on.
    """

    has_cls: bool = False
    final_norm: bool = False
    merge: int
    frames: int
    entries: int = 0
    alternating: bool = False
    window: int = 0
    taps: tuple[int, ...] = ()

    @property
    def reach(self) -> int:
        """Patches of a window; 0 without windows."""
        return (self.window * self.merge) ** 2

    @property
    def reached(self) -> tuple[int, ...]:
        """`taps`, limited to the last layer: `resize` keeps `taps`."""
        return tuple(min(tap, self.stack.layers - 1) for tap in self.taps)


@dataclass(frozen=True, kw_only=True)
class PackedConfig(LMMConfig):
    """A model with a packed vision transformer and a merger; each merged square fills a slot."""

    vision: PackedVisionConfig = part("vision", tokens="images")
    bridge: ProjectorConfig = part("bridge", tokens="images")

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of squares of the image of the usual size."""
        side = self.vision.image // (self.vision.patch * self.vision.merge)
        return side, side

    @property
    def image_tokens(self) -> int:
        """Text positions that one image slot occupies."""
        return 1

    @property
    def tokens(self) -> Mapping[str, int]:
        """Tokens per image slot that the linear maps of each stage of the image side read."""
        inside = self.vision.merge**2
        return {"vision/patches": inside, "vision": inside, "vision/out": inside, "bridge": 1, "bridge/out": 1}


class PackedEncoder(nnx.Module):
    """A vision transformer over all patches of a row; each attends to the patches of its own image or window."""

    def __init__(self, config: PackedVisionConfig, tower: Tower, *, remat: Remat = "dots"):
        self.config, width = config, config.stack.embed
        shape = (config.channels, config.frames, config.patch, config.patch, width)
        axes = ("channels", "frames", "patch_y", "patch_x", tower.embed)
        fan_in = config.channels * config.frames * config.patch**2
        self.patch = param(shape, axes, scale=fan_in**-0.5, over="vision/patches")
        table, learned = (config.entries, width), ("positions", *axes[-1:])
        self.patch_bias = param((width,), axes[-1:]) if config.patch_bias else None
        self.positions = param(table, learned, scale=0.02) if config.entries else None
        self.first_norm = Norm(config.stack, tower.embed) if config.first_norm else None
        self.stack = Stack(tower, remat=remat)

    def __call__(
        self, images: Images, gates: Gates, collect: Sequence[str] = ()
    ) -> tuple[Float[Array, "S N D"], dict[str, Array]]:
        """Encodes the squares of images.

        Args:
            images: `pixels` [B, M, merge * patch, merge * patch, C] as in `normalised`, `valid` and `place`.
            gates: axis name -> gate.
            collect: names of the intermediates to return.

        Returns:
            States of each slot's patches (the last ones, then those of the taps), and the intermediates.
        """
        config, (rows, slots) = self.config, images["valid"].shape
        back = windows = None
        if config.window and any(config.stack.is_local):
            images, numbers, back = by_window(images, config.window)
            windows = Windows(self._by_patch(images, numbers), config.reach)
        x, context = self._embedded(images)
        x = x if self.first_norm is None else self.first_norm(x, gates.get("vision/embed"))
        x, kept = self.stack(x, context._replace(windows=windows), gates, collect, taps=config.reached)

        def by_slot(states: Float[Array, "B N D"]) -> Float[Array, "S n D"]:
            states = states.reshape(rows, slots, config.merge**2, -1)
            return (states if back is None else reordered(states, back)).reshape(rows * slots, *states.shape[2:])

        if "vision/states" in kept:
            kept["vision/states"] = jax.vmap(by_slot)(kept["vision/states"])
        return jnp.concatenate([by_slot(states) for states in (x, *kept.pop("vision/taps", ()))], axis=1), kept

    def _by_patch(self, images: Images, numbers: Int[Array, "B M"]) -> Int[Array, "B N"]:
        """Numbers of slots, for each of their patches; unused slots, the last ones, have larger ones of their own."""
        slots = numbers.shape[1]
        # With one number, unused slots would attend to one another like the patches of a large image.
        numbers = jnp.where(images["valid"], numbers, slots + 1 + jnp.arange(slots)[None])
        return jnp.repeat(numbers, self.config.merge**2, axis=1)

    def _embedded(self, images: Images) -> tuple[Float[Array, "B N D"], Context]:
        """Patches of each row with their learned positions, and what they attend to."""
        config, (rows, slots) = self.config, images["valid"].shape
        side, inside = config.merge, config.merge**2
        squares = normalised(images).astype(self.patch[...].dtype)
        patches = rearrange(squares, "s (gy y) (gx x) c -> s (gy gx) c 1 y x", gy=side, gx=side)
        bias = None if self.patch_bias is None else self.patch_bias[...]
        # As in transformers, an image fills every frame of a patch.
        x = linear(jnp.repeat(patches, config.frames, axis=3), self.patch[...], bias, inputs=4)
        x = x.reshape(rows, slots * inside, -1)
        place = jnp.repeat(images["place"], inside, axis=1)
        inner = jnp.tile(jnp.arange(inside), slots)[None]
        at = (side * place[..., 0] + inner // side, side * place[..., 1] + inner % side)
        if self.positions is not None:
            learned = interpolated(self.positions[...], *at, side * place[..., 2:])
            x = (x.astype(jnp.float32) + learned).astype(x.dtype)

        angles = axial(*at, config.stack.head_dim, config.stack.rope_theta, alternating=config.alternating)
        # A mask of all pairs of patches would take 3.7 GB for 12 megapixels.
        segments = self._by_patch(images, image_of_slot(images))
        return x, Context(segments=segments, positions=angles, valid=jnp.repeat(images["valid"], inside, axis=1))
