"""Inputs of Idefics3 and SmolVLM (image tiles, and image tokens with rows and columns), and new processors."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from transformers import (
    Idefics3ImageProcessor,
    Idefics3Processor,
    ProcessorMixin,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)

from antgmm_jax.blocks.pictures import as_hf
from antgmm_jax.families.common.square import Tree, check_processor, normalisation, one_thread
from antgmm_jax.families.common.words import CHAT, AnyTokenizer, Messages, rendered, starts_itself, wrap
from antgmm_jax.families.idefics3.config import Idefics3Config

_CLASSES = {"idefics3": Idefics3Processor, "smolvlm": SmolVLMProcessor}
_SPECIAL = ("<fake_token_around_image>", "<end_of_utterance>", "<global-img>")


class Inputs:
    """Implements `antgmm_jax.families.base.Inputs`.

    Args:
        config: model config.
        processor: processor of the checkpoint.

    Raises:
        AntgmmError: the processor does not fit the model.
    """

    encoder_decoder = False

    def __init__(self, config: Idefics3Config, processor: ProcessorMixin):
        fields, kind = ("image_seq_len",), _CLASSES[config.model_type]
        check_processor(processor, config, kind=kind, fields=fields, size=lambda p: (_side(p), p.image_seq_len))
        self.processor: Any = processor
        self._scale, self._offset = normalisation(processor.image_processor)

    def chat(self, messages: Messages) -> str:
        """Renders a conversation by the chat template, or as the classic prompt."""
        image, end = self.processor.image_token, "<end_of_utterance>\nAssistant:"
        return rendered(self.processor, messages, lambda line, pictures: f"User:{image * pictures}{line}{end}")

    def __call__(self, text: str, images: Sequence[np.ndarray]) -> tuple[np.ndarray, Tree]:
        """Token ids int32 [T] of a text, and the tree of images, [M, ...]: each image as its tiles and the whole."""
        options: dict[str, Any] = {"add_special_tokens": not starts_itself(self.processor, text)}
        if images:
            # Of a picture with 1 or 3 rows of pixels, transformers would take the rows for channels.
            channels_first = [np.ascontiguousarray(np.moveaxis(image, -1, 0)) for image in images]
            options |= {"images": [channels_first], "input_data_format": "channels_first"}
            options |= {"do_rescale": False, "do_normalize": False, "return_tensors": "np"}
        with one_thread():
            out = self.processor(text=[text], **options)
        side = _side(self.processor)
        tiles = np.asarray(out["pixel_values"])[0] if images else np.zeros((0, 3, side, side))
        pixels = np.ascontiguousarray(np.moveaxis(tiles, 1, -1).astype(np.uint8))
        tree = {"pixels": pixels} | {
            name: np.tile(row, (len(pixels), 1)) for name, row in (("scale", self._scale), ("offset", self._offset))
        }
        return np.asarray(out["input_ids"][0], np.int32), tree

    @staticmethod
    def torch(batch: Mapping[str, Any], config: Any) -> Tree:
        """Converts tiles of a batch to the PyTorch model's `pixel_values` [B, M, C, H, W]; unused slots are zero."""
        del config
        images = batch["images"]
        valid = np.asarray(images["valid"])
        if not valid.any():
            return {}
        tiles = as_hf(images)
        pixels = np.zeros((*valid.shape, *tiles.shape[1:]), np.float32)
        pixels[valid] = tiles
        return {"pixel_values": pixels}


def _side(processor: Any) -> int:
    """Pixels per side of a tile."""
    return processor.image_processor.max_image_size["longest_edge"]


def new_processor(config: Idefics3Config, tokenizer: AnyTokenizer) -> ProcessorMixin:
    """Creates the processor of a model that is trained from scratch; see `antgmm_jax.families.new_processor`.

    Every image becomes one tile.
    """
    words = wrap(tokenizer, template="$A", bos_token="<s>", padding_side="left")
    words.add_special_tokens({"additional_special_tokens": ["<image>", *_SPECIAL]})
    smol, edge = config.model_type == "smolvlm", {"longest_edge": config.vision.image}
    kind = SmolVLMImageProcessor if smol else Idefics3ImageProcessor
    settings: dict[str, Any] = {"size": edge, "max_image_size": edge, "do_image_splitting": False}
    further: dict[str, Any] = {"image_seq_len": config.image_tokens, "chat_template": CHAT}
    if smol:
        further["video_processor"] = SmolVLMVideoProcessor(size=edge, max_image_size=edge)
    return _CLASSES[config.model_type](image_processor=kind(**settings), tokenizer=words, **further)
