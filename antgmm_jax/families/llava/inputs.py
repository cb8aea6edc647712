"""Inputs of LLaVA (image tokens for each image of the text), and the processor of a new model."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from transformers import CLIPImageProcessor, LlavaProcessor, ProcessorMixin, SiglipImageProcessor

from antgmm_jax.blocks.pictures import as_hf
from antgmm_jax.families.common.square import SquarePictures, Tree, check_processor, side
from antgmm_jax.families.common.words import CHAT, AnyTokenizer, Messages, rendered, starts_itself, wrap
from antgmm_jax.families.llava.config import LlavaConfig


class Inputs:
    """Implements `antgmm_jax.families.base.Inputs`.

    Args:
        config: model config.
        processor: processor of the checkpoint.

    Raises:
        AntgmmError: the processor does not fit the model.
    """

    encoder_decoder = False

    def __init__(self, config: LlavaConfig, processor: ProcessorMixin):
        fields, size = ("patch_size", "vision_feature_select_strategy"), lambda p: (side(p), _tokens(p))
        set_to = ", ".join(f"{name} = {json.dumps(value)}" for name, value in _token_settings(config).items())
        settings = f"set {set_to} in processor_config.json (older releases of transformers did not save them)"
        check_processor(processor, config, kind=LlavaProcessor, fields=fields, size=size, settings=settings)
        self.processor: Any = processor
        self._image_token, self._tokens_per_image = self.processor.image_token, config.image_tokens
        self._images = SquarePictures(processor)

    def chat(self, messages: Messages) -> str:
        """Renders a conversation by the chat template, or as the classic prompt."""
        image = f"{self._image_token}\n"
        return rendered(self.processor, messages, lambda line, pictures: f"USER: {image * pictures}{line} ASSISTANT:")

    def __call__(self, text: str, images: Sequence[np.ndarray]) -> tuple[np.ndarray, Tree]:
        """Token ids int32 [T] of a text, and the tree of images, [M, ...]."""
        text = text.replace(self._image_token, self._image_token * self._tokens_per_image)
        add_start = not starts_itself(self.processor, text)
        ids = self.processor.tokenizer(text, add_special_tokens=add_start)["input_ids"]
        return np.array(ids, np.int32), self._images(images)

    @staticmethod
    def torch(batch: Mapping[str, Any], config: Any) -> Tree:
        """Converts images of a batch to arguments of the PyTorch model."""
        del config
        return {"pixel_values": as_hf(batch["images"])}


def _token_settings(config: LlavaConfig) -> dict[str, Any]:
    """Settings of a processor that give the number of tokens of an image."""
    vision = config.vision
    strategy = "full" if vision.keep_cls else "default"
    return {
        "patch_size": vision.patch,
        "num_additional_image_tokens": int(vision.has_cls),
        "vision_feature_select_strategy": strategy,
    }


def _tokens(processor: LlavaProcessor) -> int:
    """Text positions that the processor reserves for an image."""
    patches = (side(processor) // int(processor.patch_size or 1)) ** 2
    count = patches + processor.num_additional_image_tokens
    return count - (processor.vision_feature_select_strategy == "default")


def new_processor(config: LlavaConfig, tokenizer: AnyTokenizer) -> LlavaProcessor:
    """Creates the processor of a model that is trained from scratch; see `antgmm_jax.families.new_processor`."""
    vision, image = config.vision, {"image_token": "<image>"}
    square = {"height": vision.image, "width": vision.image}
    if vision.has_cls:
        images = CLIPImageProcessor(size={"shortest_edge": vision.image}, crop_size=square)
    else:
        images = SiglipImageProcessor(size=square)
    words = wrap(tokenizer, template="$A", bos_token="<s>", padding_side="left", extra_special_tokens=image)
    return LlavaProcessor(images, words, chat_template=CHAT, **_token_settings(config))
