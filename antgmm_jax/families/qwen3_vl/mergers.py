"""The bridge of Qwen3-VL: a merger, and those of DeepStack."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from antgmm_jax.blocks.block import Gates
from antgmm_jax.blocks.merger import Merger, SquareMerger, magnitudes
from antgmm_jax.blocks.parameters import repeated_module
from antgmm_jax.config import Tower
from antgmm_jax.families.qwen3_vl.config import UNITS, Qwen3VLConfig
from antgmm_jax.families.qwen3_vl.deepstack import MERGERS


class Mergers(SquareMerger):
    """The merger that makes the embeddings of image tokens, and those of DeepStack."""

    def __init__(self, config: Qwen3VLConfig, vision: Tower, text: Tower):
        super().__init__(config, vision, text)
        image = config.vision
        self.taps, self.layers = image.reached, image.stack.layers
        build = partial(Merger, (UNITS, image.deepstack_mlp), True, self.inside, vision, text)
        self.deepstack = repeated_module(build, len(image.taps), MERGERS) if image.taps else None

    def added(
        self, features: Float[Array, "S N V"], gates: Gates, collect: Sequence[str] = ()
    ) -> tuple[Float[Array, "K S E"] | None, dict[str, Array]]:
        """What DeepStack adds for each square after each of the first K text layers, or None without mergers.

        If `collect` contains the mergers' units, also returns their norms [L, S, U], 0 for layers without a merger.
        """
        if self.deepstack is None:
            return None, {}
        taps = jnp.array(self.taps)
        states = jnp.moveaxis(features[:, self.inside :].reshape(len(features), len(taps), self.inside, -1), 1, 0)
        graph, leaves = nnx.split(self.deepstack)
        units = gates[UNITS][taps] if UNITS in gates else None

        def merge(own: Any, patches: Array, open_units: Array | None) -> tuple[Array, Array]:
            return nnx.merge(graph, own)(patches, gates.get("vision/embed"), open_units)

        out, hidden = jax.vmap(merge, in_axes=(0, 0, None if units is None else 0))(leaves, states, units)
        kept = jnp.zeros((self.layers, *hidden.shape[1:])).at[taps].set(magnitudes(hidden))
        return out, {UNITS: kept} if UNITS in collect else {}
