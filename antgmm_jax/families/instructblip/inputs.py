"""Inputs of InstructBLIP (those of BLIP-2, and the instruction for the Q-Former), and the processor of a new model."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from transformers import BlipImageProcessor, InstructBlipProcessor, ProcessorMixin

from antgmm_jax.blocks.pictures import as_hf
from antgmm_jax.errors import AntgmmError
from antgmm_jax.families.blip2 import inputs as blip2
from antgmm_jax.families.common.square import Tree
from antgmm_jax.families.common.words import AnyTokenizer, LongText, wrap
from antgmm_jax.families.instructblip.config import InstructBlipConfig


class Inputs(blip2.Inputs):
    """Implements `antgmm_jax.families.base.Inputs`.

    Args:
        config: model config.
        processor: processor of the checkpoint.

    Raises:
        AntgmmError: the processor does not fit the model.
    """

    kind = InstructBlipProcessor

    def __init__(self, config: InstructBlipConfig, processor: ProcessorMixin):
        super().__init__(config, processor)
        self._words: Any = self.processor.qformer_tokenizer
        self._limit = config.instruction
        if len(self._words) > config.bridge.words:
            raise AntgmmError(
                f"the Q-Former's tokenizer has {len(self._words)} tokens, the Q-Former {config.bridge.words}:"
                " save the model's own processor in its folder"
            )

    def __call__(self, text: str, images: Sequence[np.ndarray]) -> tuple[np.ndarray, Tree]:
        """Token ids int32 [T] of a text behind the image tokens, and the tree of images, [M, ...]."""
        ids, tree = super().__call__(text, images)
        words = self._words(text)["input_ids"]
        if images and len(words) > self._limit:
            raise LongText(
                f"an instruction of {len(words)} tokens: the Q-Former reads at most {self._limit}; shorten the text",
                part="instruction",
                tokens=len(words),
                limit=self._limit,
            )
        row = np.full((1, self._limit), -1, np.int32)
        row[0, : len(words)] = words[: self._limit]
        return ids, {**tree, "instruction": np.repeat(row, len(images), axis=0)}

    @staticmethod
    def torch(batch: Mapping[str, Any], config: Any) -> Tree:
        """Converts images of a batch and their instructions to arguments of the PyTorch model."""
        del config
        images = batch["images"]
        words = np.asarray(images["instruction"])[np.asarray(images["valid"])].astype(np.int64)
        return {
            "pixel_values": as_hf(images),
            "qformer_input_ids": np.maximum(words, 0),
            "qformer_attention_mask": (words >= 0).astype(np.int64),
        }


def new_processor(config: InstructBlipConfig, tokenizer: AnyTokenizer) -> InstructBlipProcessor:
    """Creates the processor of a model that is trained from scratch; see `antgmm_jax.families.new_processor`."""
    px = config.vision.image
    images = BlipImageProcessor(size={"height": px, "width": px})
    words = wrap(tokenizer, template="$A")
    return InstructBlipProcessor(
        images, blip2.wrapped(config, tokenizer), words, num_query_tokens=config.bridge.queries
    )
