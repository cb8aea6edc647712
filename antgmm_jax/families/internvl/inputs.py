"""Inputs of InternVL: tiles of images, each with as many image tokens, and the processor of a new model."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from transformers import GotOcr2ImageProcessor, InternVLProcessor, InternVLVideoProcessor, ProcessorMixin

from antgmm_jax.blocks.pictures import as_hf
from antgmm_jax.families.common.square import Tree, check_processor, normalisation, side, unscaled
from antgmm_jax.families.common.words import CHAT, AnyTokenizer, Messages, rendered, wrap
from antgmm_jax.families.internvl.config import InternVLConfig

_START, _END, _VIDEO = "<img>", "</img>", "<video>"


class Inputs:
    """Implements `antgmm_jax.families.base.Inputs`.

    Args:
        config: model config.
        processor: processor of the checkpoint.

    Raises:
        AntgmmError: the processor does not fit the model.
    """

    encoder_decoder = False

    def __init__(self, config: InternVLConfig, processor: ProcessorMixin):
        size = lambda p: (side(p), p.image_seq_length)  # noqa: E731
        check_processor(processor, config, kind=InternVLProcessor, fields=("image_seq_length",), size=size)
        self.processor: Any = processor
        self._shape = (0, config.vision.channels, config.vision.image, config.vision.image)
        self._scale, self._offset = normalisation(self.processor.image_processor)

    def chat(self, messages: Messages) -> str:
        """Renders a conversation by the chat template, or in ChatML without a template."""
        image = f"{self.processor.image_token}\n"

        def plain(line: str, pictures: int) -> str:
            return f"<|im_start|>user\n{image * pictures}{line}<|im_end|>\n<|im_start|>assistant\n"

        return rendered(self.processor, messages, plain)

    def __call__(self, text: str, images: Sequence[np.ndarray]) -> tuple[np.ndarray, Tree]:
        """Token ids int32 [T] of a text, and the tree of images, [M, ...]: the tiles of each image, then all of it."""
        out = unscaled(self.processor, text, images)
        tiles = np.asarray(out["pixel_values"]) if images else np.zeros(self._shape)
        pixels = np.ascontiguousarray(np.moveaxis(tiles, 1, -1).astype(np.uint8))
        tree = {"pixels": pixels} | {
            name: np.tile(row, (len(pixels), 1)) for name, row in (("scale", self._scale), ("offset", self._offset))
        }
        return np.asarray(out["input_ids"][0], np.int32), tree

    @staticmethod
    def torch(batch: Mapping[str, Any], config: Any) -> Tree:
        """Converts tiles of a batch to arguments of the PyTorch model."""
        del config
        return {"pixel_values": as_hf(batch["images"])}


def new_processor(config: InternVLConfig, tokenizer: AnyTokenizer) -> InternVLProcessor:
    """Creates the processor of a model that is trained from scratch; see `antgmm_jax.families.new_processor`.

    An image becomes at most two tiles, and one that shows all of it.
    """
    tokens = {
        "context_image_token": "<image>",
        "start_image_token": _START,
        "end_image_token": _END,
        "video_token": _VIDEO,
    }
    words = wrap(tokenizer, template="$A", bos_token="<s>", padding_side="left", extra_special_tokens=tokens)
    size = {"height": config.vision.image, "width": config.vision.image}
    return InternVLProcessor(
        GotOcr2ImageProcessor(size=size, max_patches=2),
        words,
        InternVLVideoProcessor(size=size),
        image_seq_length=config.image_tokens,
        chat_template=CHAT,
    )
