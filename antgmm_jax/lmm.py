"""The whole model: image encoder -> bridge -> language model."""

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from antgmm_jax.bridge import Projector, QFormer
from antgmm_jax.config import LMMConfig, QFormerConfig, Remat
from antgmm_jax.errors import AntgmmError
from antgmm_jax.language import LanguageModel, Prefilled
from antgmm_jax.pictures import Images, by_row, flat
from antgmm_jax.stack import Gates
from antgmm_jax.vision import VisionEncoder

Batch = Mapping[str, Array]


class LMM(nnx.Module):
    """A large multimodal model as one NNX module; `functional` is the way to it."""

    def __init__(self, config: LMMConfig, *, remat: Remat = "dots", rngs: nnx.Rngs):
        self.config = config
        vision, text = config.vision.stack.embed, config.language.decoder.embed
        self.vision = VisionEncoder(config.vision, remat=remat, rngs=rngs)
        if isinstance(config.bridge, QFormerConfig):
            self.bridge = QFormer(config.bridge, text, remat=remat, rngs=rngs)
        else:
            self.bridge = Projector(config.bridge, vision, text, rngs=rngs)
        self.language = LanguageModel(config.language, remat=remat, rngs=rngs)

    def vision_features(
        self, images: Images, gates: Gates, collect: Sequence[str] = ()
    ) -> tuple[Float[Array, "B M N D"], dict[str, Array]]:
        """What the image side hands to its last linear map: the part that can be computed once and kept."""
        states, kept = self.vision(images, gates, collect)
        features, more = self.bridge.features(states, gates, collect)
        return by_row(features, images), {**kept, **more}

    def inputs(
        self, batch: Batch, gates: Gates, collect: Sequence[str] = ()
    ) -> tuple[Float[Array, "B T D"], dict[str, Array]]:
        """Embedded prompt: tokens, with image features in the place of the image tokens."""
        ids = batch["input_ids"]
        words = self.language.embed(ids)
        if batch["images"]["valid"].shape[1] == 0:
            return words, {}
        if "vision_features" in batch:
            features, kept = batch["vision_features"].astype(words.dtype), {}
        else:
            features, kept = self.vision_features(batch["images"], gates, collect)
        states, more = self.bridge.project(flat(features), gates, collect)
        # The n-th image token of a row takes the n-th image state: slots in use come first.
        states = states.reshape(ids.shape[0], -1, states.shape[-1])
        is_image = ids == self.config.image_token
        order = jnp.clip(jnp.cumsum(is_image, axis=1) - 1, 0, states.shape[1] - 1)
        placed = jnp.take_along_axis(states, order[:, :, None], axis=1)
        return jnp.where(is_image[:, :, None], placed, words), {**kept, **more}

    def __call__(self, batch: Batch, gates: Gates, collect: Sequence[str] = ()) -> dict[str, Array]:
        """Logits at every position, teacher forced; `Functional.apply` documents arguments and result."""
        x, kept = self.inputs(batch, gates, collect)
        valid = batch["attention_mask"].astype(bool)
        if self.config.language.encoder is None:
            final, more = self.language.decode(x, valid, None, None, gates, collect, batch.get("segment_ids"))
        elif "segment_ids" in batch:
            raise AntgmmError("a model with an encoder does not read packed rows: leave out pack, use buckets")
        else:
            memory, seen = self.language.encode(x, valid, gates, collect)
            target = self.language.embed(batch["decoder_input_ids"])
            # T5 masks no position of its decoder, but what stands for padding is no answer.
            counted = batch["labels"] >= 0 if "labels" in batch else None
            final, more = self.language.decode(target, None, memory, valid, gates, collect, counted=counted)
            # Both stacks norm the same width: its activation is the mean of the two.
            if "text/embed" in seen:
                more["text/embed"] = (seen.pop("text/embed") + more["text/embed"]) / 2
            more.update(seen)
        out = {"logits": self.language.head(final, gates), **kept, **more}
        if "final" in collect:
            out["final"] = final
        return out

    def prefill(self, batch: Batch, max_new_tokens: int) -> tuple[Prefilled, Array | None]:
        """Reads a prompt: the caches and first logits, and which encoder states are tokens (None without encoder)."""
        x, _ = self.inputs(batch, {})
        valid = batch["attention_mask"].astype(bool)
        if self.config.language.encoder is None:
            return self.language.prefill(x, valid, None, x.shape[1] + max_new_tokens), None
        memory, _ = self.language.encode(x, valid, {})
        start = jnp.full((x.shape[0], 1), self.config.language.start_token)
        target = self.language.embed(start)
        state = self.language.prefill(target, jnp.ones_like(start, bool), memory, 1 + max_new_tokens, valid)
        return state, valid
