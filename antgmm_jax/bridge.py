"""From image states to text positions: BLIP-2's Q-Former, LLaVA's projector."""

from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from antgmm_jax.config import ProjectorConfig, QFormerConfig, Remat
from antgmm_jax.layers import ACTIVATIONS, Norm, linear, param, repeated
from antgmm_jax.stack import Context, Gates, Stack

OUT = "bridge/out"
"""What the language model is handed, under this name among the collected."""


class QFormer(nnx.Module):
    """Learnt queries that read image states through a stack with cross-attention, then a linear map."""

    def __init__(self, config: QFormerConfig, text_embed: int, *, remat: Remat = "dots", rngs: nnx.Rngs):
        width = config.stack.embed
        self.queries = param(rngs.params(), (config.queries, width), ("queries", "bridge/embed"), scale=0.02)
        self.norm = Norm(config.stack, "bridge/embed", rngs=rngs)
        self.stack = Stack(config.stack, "bridge", "vision/embed", remat=remat, rngs=rngs)
        axes = ("bridge/embed", "text/embed")
        self.out = param(rngs.params(), (width, text_embed), axes, scale=width**-0.5)
        self.out_bias = param(rngs.params(), (text_embed,), axes[1:], scale=None)

    def features(
        self, vision: Float[Array, "B N V"], gates: Gates, collect: Sequence[str] = ()
    ) -> tuple[Float[Array, "B Q D"], dict[str, Array]]:
        """Query states after the stack, and the intermediates named in `collect`."""
        x = repeated(self.norm(self.queries[...], gates.get("bridge/embed")), vision.shape[0])
        return self.stack(x, Context(memory=vision), gates, collect)

    def project(
        self, features: Float[Array, "B Q D"], gates: Gates, collect: Sequence[str] = ()
    ) -> tuple[Float[Array, "B Q E"], dict[str, Array]]:
        """Query states as text embeddings, and the same [1, B, Q, E] where `collect` names `bridge/out`.

        The last norm of the stack has gated the input.
        """
        out = linear(features, self.out[...], self.out_bias[...])
        return out, {OUT: out[None]} if OUT in collect else {}


class Projector(nnx.Module):
    """A perceptron from image states to text embeddings."""

    def __init__(self, config: ProjectorConfig, vision_embed: int, text_embed: int, *, rngs: nnx.Rngs):
        self.act = config.act
        axes = ("vision/embed", "bridge/mlp", "text/embed")
        self.up = param(rngs.params(), (vision_embed, config.mlp), axes[:2], scale=vision_embed**-0.5)
        self.down = param(rngs.params(), (config.mlp, text_embed), axes[1:], scale=config.mlp**-0.5)
        self.up_bias = param(rngs.params(), (config.mlp,), axes[1:2], scale=None) if config.bias else None
        self.down_bias = param(rngs.params(), (text_embed,), axes[2:], scale=None) if config.bias else None

    def features(
        self, vision: Float[Array, "B N V"], gates: Gates, collect: Sequence[str] = ()
    ) -> tuple[Float[Array, "B N V"], dict[str, Array]]:
        """Image states as they are: a projector has no stack."""
        return vision, {}

    def project(
        self, features: Float[Array, "B N V"], gates: Gates, collect: Sequence[str] = ()
    ) -> tuple[Float[Array, "B N E"], dict[str, Array]]:
        """Image states as text embeddings; `collect` names the same [1, B, N, E] and inner units' norms [B, M]."""
        hidden = linear(features, self.up[...], None if self.up_bias is None else self.up_bias[...])
        hidden = ACTIVATIONS[self.act](hidden)
        if "bridge/mlp" in gates:
            hidden = hidden * gates["bridge/mlp"].astype(hidden.dtype)
        kept = {"bridge/mlp": jnp.linalg.norm(hidden.astype(jnp.float32), axis=1)} if "bridge/mlp" in collect else {}
        out = linear(hidden, self.down[...], None if self.down_bias is None else self.down_bias[...])
        return out, {**kept, OUT: out[None]} if OUT in collect else kept
