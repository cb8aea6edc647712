"""InstructBLIP: the common parts and a Q-Former that reads the instruction."""

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from antgmm_jax.blocks.block import Context, Gates
from antgmm_jax.blocks.layers import plus, repeated
from antgmm_jax.blocks.parameters import param
from antgmm_jax.blocks.pictures import Images, flat
from antgmm_jax.blocks.tables import lookup
from antgmm_jax.config import Remat, Tower
from antgmm_jax.families.blip2.model import QFormer
from antgmm_jax.families.instructblip.config import InstructBlipConfig, InstructQFormerConfig
from antgmm_jax.lmm import LMM, assemble


class InstructQFormer(QFormer):
    """A Q-Former of which queries and instruction attend to one another; only the queries read the image."""

    def __init__(
        self,
        config: InstructQFormerConfig,
        tower: Tower,
        memory: int,
        text: int,
        *,
        remat: Remat = "dots",
    ):
        super().__init__(config, tower, memory, text, remat=remat)
        width, axis = config.stack.embed, tower.embed
        self.words = param((config.words, width), ("words", axis), scale=0.02)
        self.positions = param((config.positions, width), ("positions", axis), scale=0.02)

    def read(
        self,
        vision: Float[Array, "S N V"],
        instruction: Int[Array, "S L"],
        gates: Gates,
        collect: Sequence[str] = (),
    ) -> tuple[Float[Array, "S Q D"], dict[str, Array]]:
        """Runs queries and instruction through the stack.

        Args:
            vision: image states.
            instruction: token ids, -1 behind the last one.
            gates: axis name -> gate.
            collect: names of the intermediates to return.

        Returns:
            Query states, and the intermediates; `bridge/states` are those of the queries.
        """
        slots, length = instruction.shape
        words = plus(lookup(self.words[...], jnp.maximum(instruction, 0)), self.positions[...][:length])
        queries = repeated(self.queries[...], slots)
        x = self.norm(jnp.concatenate([queries, words], axis=1), gates.get("bridge/embed"))
        count = queries.shape[1]
        valid = jnp.concatenate([jnp.ones((slots, count), bool), instruction >= 0], axis=1)
        # Instructions are padded on the right.
        lengths = valid.sum(axis=1, dtype=jnp.int32)
        context = Context(memory=vision, mask=valid[:, None, None, :], valid=valid, queries=count, lengths=lengths)
        x, kept = self.stack(x, context, gates, collect)
        if "bridge/states" in kept:
            kept["bridge/states"] = kept["bridge/states"][:, :, :count]
        return x[:, :count], kept


class InstructBlip(LMM):
    """The whole model; its image features depend on the instruction."""

    bridge: InstructQFormer

    def bridged(
        self, states: Float[Array, "S N V"], images: Images, gates: Gates, collect: Sequence[str] = ()
    ) -> tuple[Float[Array, "S Q D"], dict[str, Array]]:
        """Returns query states after the Q-Former, and the intermediates named in `collect`."""
        return self.bridge.read(states, flat(images["instruction"]), gates, collect)


def build(config: InstructBlipConfig, *, remat: Remat) -> LMM:
    """Builds the model; see `antgmm_jax.lmm.assemble`."""
    vision, text = config.vision.stack.embed, config.language.decoder.embed

    def bridge(stacks: Mapping[str, Tower]) -> InstructQFormer:
        return InstructQFormer(config.bridge, stacks["bridge"], vision, text, remat=remat)

    return assemble(config, bridge, remat=remat, kind=InstructBlip)
