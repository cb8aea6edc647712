"""The projector: an MLP from image states to text embeddings, the bridge of several families."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from antgmm_jax.axes import axis
from antgmm_jax.blocks.block import Gates
from antgmm_jax.blocks.layers import ACTIVATIONS, gated, linear
from antgmm_jax.blocks.parameters import param
from antgmm_jax.config import Act, Tower

OUT = "bridge/out"
"""Name of the bridge's output among the collected intermediates."""


@dataclass(frozen=True, kw_only=True)
class ProjectorConfig:
    """A two-layer MLP from the image encoder's width to the text width."""

    mlp: int = axis()
    act: Act
    bias: bool = True


class Projector(nnx.Module):
    """A two-layer MLP from image states to text embeddings."""

    def __init__(self, config: ProjectorConfig, vision: Tower, text: Tower):
        self.act = config.act
        wide, narrow = vision.stack.embed, text.stack.embed
        axes = (vision.embed, "bridge/mlp", text.embed)
        self.up = param((wide, config.mlp), axes[:2], scale=wide**-0.5, over=OUT)
        self.down = param((config.mlp, narrow), axes[1:], scale=config.mlp**-0.5, over=OUT)
        self.up_bias = param((config.mlp,), axes[1:2]) if config.bias else None
        self.down_bias = param((narrow,), axes[2:]) if config.bias else None

    def features(
        self, vision: Float[Array, "S N V"], gates: Gates, collect: Sequence[str] = ()
    ) -> tuple[Float[Array, "S N V"], dict[str, Array]]:
        """Returns the image states unchanged: a projector has no stack."""
        return vision, {}

    def project(
        self, features: Float[Array, "S N V"], gates: Gates, collect: Sequence[str] = ()
    ) -> tuple[Float[Array, "S N E"], dict[str, Array]]:
        """Maps image states to text embeddings; collects the norms [S, M] of `bridge/mlp` if named in `collect`."""
        hidden = linear(features, self.up[...], None if self.up_bias is None else self.up_bias[...])
        hidden = gated(ACTIVATIONS[self.act](hidden), gates.get("bridge/mlp"))
        kept = {"bridge/mlp": jnp.linalg.norm(hidden.astype(jnp.float32), axis=1)} if "bridge/mlp" in collect else {}
        return linear(hidden, self.down[...], None if self.down_bias is None else self.down_bias[...]), kept
