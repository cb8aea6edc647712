"""Attention bias by the distance of query and key."""

import math

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from antgmm_jax.blocks.parameters import param
from antgmm_jax.config import Tower


class RelativeBias(nnx.Module):
    """T5's learnt attention bias by bucketed distance (arXiv 1910.10683), one table per stack."""

    def __init__(self, tower: Tower):
        config, heads_axis = tower.stack, tower.axis("heads")
        self.buckets, self.distance, self.two_sided = (
            config.relative_buckets,
            config.relative_distance,
            not config.causal,
        )
        scale = config.embed**-0.5
        self.table = param((config.relative_buckets, config.heads), ("buckets", heads_axis), scale=scale)

    def __call__(self, queries: Int[Array, " T"], keys: Int[Array, " S"]) -> Float[Array, "1 H T S"]:
        """Bias between query and key positions; float32, as its gradient sums over layers, rows and positions."""
        offset = keys[None, :] - queries[:, None]
        buckets, first = self.buckets, jnp.zeros_like(offset)
        if self.two_sided:
            buckets //= 2
            first, offset = (offset > 0) * buckets, jnp.abs(offset)
        else:
            offset = jnp.maximum(-offset, 0)
        exact = buckets // 2
        # float32 logarithm as in the reference; the maximum keeps the unused branch finite.
        ratio = jnp.log(jnp.maximum(offset, 1).astype(jnp.float32) / exact) / math.log(self.distance / exact)
        far = jnp.minimum(exact + (ratio * (buckets - exact)).astype(offset.dtype), buckets - 1)
        bucket = first + jnp.where(offset < exact, offset, far)
        return jnp.transpose(self.table[...].astype(jnp.float32)[bucket], (2, 0, 1))[None]
