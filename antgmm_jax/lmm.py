"""The whole model: image encoder -> bridge -> language model."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from antgmm_jax.blocks.block import Gates
from antgmm_jax.blocks.grids import image_states
from antgmm_jax.blocks.language import Embedded, LanguageModel, Prefilled, padded_right
from antgmm_jax.blocks.pictures import Images, by_row, flat
from antgmm_jax.blocks.projector import OUT
from antgmm_jax.blocks.vision import VisionEncoder
from antgmm_jax.config import LMMConfig, Remat, Tower, towers
from antgmm_jax.errors import AntgmmError

Batch = Mapping[str, Any]


@runtime_checkable
class Encoder(Protocol):
    """An image encoder: (images, gates, collect) -> states of all slots [B * M, N, D], and collected intermediates."""

    def __call__(
        self, images: Images, gates: Gates, collect: Sequence[str] = ()
    ) -> tuple[Float[Array, "S N D"], dict[str, Array]]:
        """Encodes the image slots of all rows."""
        ...


@runtime_checkable
class Bridge(Protocol):
    """Maps image states to text embeddings, in two steps so that the result of the first can be cached."""

    def features(
        self, vision: Float[Array, "S N V"], gates: Gates, collect: Sequence[str] = ()
    ) -> tuple[Float[Array, "S Q D"], dict[str, Array]]:
        """The first step, before the last linear maps; the result can be cached."""
        ...

    def project(
        self, features: Float[Array, "S Q D"], gates: Gates, collect: Sequence[str] = ()
    ) -> tuple[Float[Array, "S Q E"], dict[str, Array]]:
        """The last linear maps, to text embeddings."""
        ...


class LMM(nnx.Module):
    """A vision-language model as one NNX module; use `functional` to run it."""

    def __init__(self, config: LMMConfig, vision: Encoder, bridge: Bridge, language: LanguageModel):
        self.config = config
        self.vision, self.bridge, self.language = vision, bridge, language

    def vision_features(
        self, images: Images, gates: Gates, collect: Sequence[str] = ()
    ) -> tuple[Float[Array, "B M N D"], dict[str, Array]]:
        """Image features before the bridge's last linear maps (they can be cached), and collected intermediates."""
        states, kept = self.vision(images, gates, collect)
        features, more = self.bridged(states, images, gates, collect)
        return by_row(features, images), {**kept, **more}

    def bridged(
        self, states: Float[Array, "S N V"], images: Images, gates: Gates, collect: Sequence[str] = ()
    ) -> tuple[Float[Array, "S Q D"], dict[str, Array]]:
        """Applies the bridge's first step to the image encoder's states."""
        return self.bridge.features(states, gates, collect)

    def inputs(self, batch: Batch, gates: Gates, collect: Sequence[str] = ()) -> tuple[Embedded, dict[str, Array]]:
        """Embeds the prompt, with image states in place of the image tokens."""
        ids = batch["input_ids"]
        words = self.language.embed(ids, gates)
        if batch["images"]["valid"].shape[1] == 0:
            return Embedded(words), {}
        if "vision_features" in batch:
            features, kept = batch["vision_features"].astype(words.dtype), {}
        else:
            features, kept = self.vision_features(batch["images"], gates, collect)
        states, more = self.bridge.project(flat(features), gates, collect)
        kept = {**kept, **more, **({OUT: states[None]} if OUT in collect else {})}
        # Used slots come first.
        states = states.reshape(ids.shape[0], -1, states.shape[-1])
        is_image, placed = self.at_tokens(states, batch)
        return Embedded(jnp.where(is_image[:, :, None], placed, words)), kept

    def at_tokens(
        self, states: Float[Array, "B N E"], batch: Batch
    ) -> tuple[Bool[Array, "B T"], Float[Array, "B T E"]]:
        """Returns which tokens are image tokens, and their states: those of the row's slots, one after another.

        Args:
            states: embeddings of the image slots of each row, N = slots * states per slot.
            batch: model inputs.
        """
        return image_states(batch["input_ids"], self.config.image_token, states)

    def __call__(self, batch: Batch, gates: Gates, collect: Sequence[str] = ()) -> dict[str, Array]:
        """Logits at every position with teacher forcing; `Functional.apply` documents arguments and result."""
        tokens, kept = self.inputs(batch, gates, collect)
        valid, about = batch["attention_mask"].astype(bool), {"lengths": batch.get("lengths")}
        if not self.config.encoder_decoder:
            about["segments"] = batch.get("segment_ids")
            final, more = self.language.decode(tokens, valid, None, None, gates, collect, **about)
        elif "segment_ids" in batch:
            raise AntgmmError("a model with an encoder cannot read packed rows: remove `pack` and use buckets")
        else:
            memory, seen = self.language.encode(tokens.x, valid, gates, collect, **about)
            target = Embedded(self.language.embed(batch["decoder_input_ids"], gates))
            # The decoder masks no position, but collected norms must not count padding.
            counted = batch["labels"] >= 0 if "labels" in batch else None
            final, more = self.language.decode(target, None, memory, valid, gates, collect, counted=counted, **about)
            # Both stacks share the width axis: its activation is the mean of the two.
            if "text/embed" in seen:
                more["text/embed"] = (seen.pop("text/embed") + more["text/embed"]) / 2
            more.update(seen)
        out = {"logits": self.language.head(final, gates), **kept, **more}
        if "final" in collect:
            out["final"] = final
        return out

    def prefill(self, batch: Batch, max_new_tokens: int) -> tuple[Prefilled, Array | None]:
        """Reads a prompt; returns caches and first logits, and the encoder's token mask (None without encoder)."""
        tokens, _ = self.inputs(batch, {})
        tokens, valid, lengths = padded_right(tokens, batch["attention_mask"].astype(bool))
        if not self.config.encoder_decoder:
            slots = valid.shape[1] + max_new_tokens
            return self.language.prefill(tokens, valid, None, slots, lengths=lengths), None
        memory, _ = self.language.encode(tokens.x, valid, {}, lengths=lengths)
        start = jnp.full((valid.shape[0], 1), self.config.language.start_token)
        target = Embedded(self.language.embed(start))
        state = self.language.prefill(target, jnp.ones_like(start, bool), memory, 1 + max_new_tokens, valid)
        return state, valid


def assemble(
    config: LMMConfig,
    bridge: Callable[[Mapping[str, Tower]], Bridge],
    *,
    remat: Remat,
    encoder: Callable[..., Encoder] = VisionEncoder,
    kind: type[LMM] = LMM,
) -> LMM:
    """Builds a model with new parameters from the common language model and a family's image side.

    Args:
        config: model config.
        bridge: towers -> the bridge.
        remat: what the stacks save for the backward pass.
        encoder: (vision config, tower, remat=) -> the image encoder.
        kind: class of the model.

    Returns:
        The module.
    """
    stacks = towers(config)
    vision = encoder(config.vision, stacks["vision"], remat=remat)
    return kind(config, vision, bridge(stacks), LanguageModel(config.language, stacks, remat=remat))
