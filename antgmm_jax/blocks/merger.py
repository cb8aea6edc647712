"""A bridge that merges the patches of a square to one text embedding."""

from collections.abc import Sequence

import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from antgmm_jax.blocks.block import Gates
from antgmm_jax.blocks.layers import ACTIVATIONS, gated, linear, normed
from antgmm_jax.blocks.packed import PackedConfig
from antgmm_jax.blocks.parameters import param
from antgmm_jax.blocks.projector import OUT
from antgmm_jax.config import Act, Tower


class Merger(nnx.Module):
    """A norm and a perceptron from the patches of a square to a text embedding.

    The norm is over each patch, or over all patches of the square if `joined`.
    """

    def __init__(
        self,
        units: tuple[str, int],
        joined: bool,
        inside: int,
        vision: Tower,
        text: Tower,
        *,
        norm: tuple[str, float] | None = None,
        act: Act = "gelu",
    ):
        """`norm` is the kind and epsilon of the norm, those of the image encoder's by default."""
        (axis, size), wide = units, vision.stack.embed
        kind, self.eps = norm or (vision.stack.norm, vision.stack.eps)
        self.rms, self.joined, self.act = kind == "rms", joined, act
        shape, axes = ((inside, wide), ("merged", vision.embed)) if joined else ((wide,), (vision.embed,))
        self.scale = param(shape, axes, mean=1.0)
        self.bias = None if self.rms else param(shape, axes)
        fan_in = inside * wide
        up = ("merged", vision.embed, axis)
        self.up = param((inside, wide, size), up, scale=fan_in**-0.5, over=OUT)
        self.up_bias = param((size,), (axis,))
        narrow = (size, text.stack.embed)
        self.down = param(narrow, (axis, text.embed), scale=size**-0.5, over=OUT)
        self.down_bias = param(narrow[1:], (text.embed,))

    def __call__(
        self, patches: Float[Array, "S P V"], open_width: Array | None, open_units: Array | None
    ) -> tuple[Float[Array, "S E"], Float[Array, "S U"]]:
        """Returns the embedding of each square and its hidden units; takes gates of the width and of the units."""
        x, gate = patches, open_width
        if self.joined:
            x, gate = x.reshape(len(x), -1), None if gate is None else jnp.tile(gate, x.shape[1])
        scale, bias = self.scale[...].reshape(-1), None if self.bias is None else self.bias[...].reshape(-1)
        x = normed(x, scale, bias, eps=self.eps, rms=self.rms, gate=gate).reshape(patches.shape)
        hidden = ACTIVATIONS[self.act](linear(x, self.up[...], self.up_bias[...], inputs=2))
        hidden = gated(hidden, open_units)
        return linear(hidden, self.down[...], self.down_bias[...]), hidden


class SquareMerger(nnx.Module):
    """The bridge: a merger over the last states of the patches of each square."""

    def __init__(self, config: PackedConfig, vision: Tower, text: Tower):
        self.inside = config.vision.merge**2
        self.merger = Merger(("bridge/mlp", config.bridge.mlp), False, self.inside, vision, text)

    def features(
        self, vision: Float[Array, "S N V"], gates: Gates, collect: Sequence[str] = ()
    ) -> tuple[Float[Array, "S N V"], dict[str, Array]]:
        """Returns the image states unchanged: there is no stack."""
        return vision, {}

    def project(
        self, features: Float[Array, "S N V"], gates: Gates, collect: Sequence[str] = ()
    ) -> tuple[Float[Array, "S 1 E"], dict[str, Array]]:
        """Maps squares to text embeddings; if `bridge/mlp` is in `collect`, also returns norms of its units [S, M]."""
        last = features[:, : self.inside]
        out, hidden = self.merger(last, gates.get("vision/embed"), gates.get("bridge/mlp"))
        return out[:, None], {"bridge/mlp": magnitudes(hidden)} if "bridge/mlp" in collect else {}


def squares(states: Float[Array, "S N V"], side: int) -> Float[Array, "S Q P V"]:
    """Groups the patches of a square image to squares of `side` x `side` patches, both row by row."""
    count = round(states.shape[1] ** 0.5) // side
    return rearrange(states, "s (gy y gx x) d -> s (gy gx) (y x) d", gy=count, y=side, x=side, gx=count)


def magnitudes(hidden: Array) -> Array:
    """Absolute values of hidden units, float32: the norms of units with one token a slot."""
    return jnp.abs(hidden.astype(jnp.float32))
