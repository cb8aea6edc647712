"""What the vision-language models of the Qwen series share."""

from collections.abc import Sequence

from jaxtyping import Array

from antgmm_jax.blocks.block import Gates
from antgmm_jax.blocks.grids import token_places
from antgmm_jax.blocks.language import Embedded
from antgmm_jax.lmm import LMM, Batch


class QwenVL(LMM):
    """A model with text positions in three dimensions."""

    def inputs(self, batch: Batch, gates: Gates, collect: Sequence[str] = ()) -> tuple[Embedded, dict[str, Array]]:
        """Embeds the prompt, with image states in place of the image tokens, and computes positions."""
        tokens, kept = super().inputs(batch, gates, collect)
        images = batch["images"]
        if images["valid"].shape[1] == 0:
            return tokens, kept
        mask = batch["attention_mask"].astype(bool)
        token, segments = self.config.image_token, batch.get("segment_ids")
        return tokens._replace(places=token_places(batch["input_ids"], mask, images["place"], token, segments)), kept
