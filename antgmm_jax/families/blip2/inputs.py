"""Inputs of BLIP-2 (query tokens for the images, then the question), and the processor of a new model."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from transformers import Blip2Processor, BlipImageProcessor, PreTrainedTokenizerFast, ProcessorMixin

from antgmm_jax.blocks.pictures import as_hf
from antgmm_jax.config import LMMConfig
from antgmm_jax.families.blip2.config import Blip2Config
from antgmm_jax.families.common.square import SquarePictures, Tree, check_processor, side
from antgmm_jax.families.common.words import AnyTokenizer, Messages, rendered, wrap


class Inputs:
    """Implements `antgmm_jax.families.base.Inputs`.

    Args:
        config: model config.
        processor: processor of the checkpoint.

    Raises:
        AntgmmError: the processor does not fit the model.
    """

    kind: type[ProcessorMixin] = Blip2Processor

    def __init__(self, config: LMMConfig, processor: ProcessorMixin):
        fields, size = ("num_query_tokens",), lambda p: (side(p), int(p.num_query_tokens))
        check_processor(processor, config, kind=self.kind, fields=fields, size=size)
        self.processor: Any = processor
        self._images = SquarePictures(processor)
        self.encoder_decoder = config.encoder_decoder
        self._token, self._tokens_per_image = config.image_token, config.image_tokens

    def chat(self, messages: Messages) -> str:
        """Returns the text of a single user turn: the processor adds the image tokens."""
        return rendered(self.processor, messages, lambda line, pictures: line)

    def __call__(self, text: str, images: Sequence[np.ndarray]) -> tuple[np.ndarray, Tree]:
        """Token ids int32 [T] of a text behind the image tokens, and the tree of images, [M, ...]."""
        ids = [self._token] * (self._tokens_per_image * len(images)) + self.processor.tokenizer(text)["input_ids"]
        return np.array(ids, np.int32), self._images(images)

    @staticmethod
    def torch(batch: Mapping[str, Any], config: Any) -> Tree:
        """Converts images of a batch to arguments of the PyTorch model."""
        del config
        return {"pixel_values": as_hf(batch["images"])}


def new_processor(config: Blip2Config, tokenizer: AnyTokenizer) -> Blip2Processor:
    """Creates the processor of a model that is trained from scratch; see `antgmm_jax.families.new_processor`."""
    px = config.vision.image
    images = BlipImageProcessor(size={"height": px, "width": px})
    return Blip2Processor(images, wrapped(config, tokenizer), num_query_tokens=config.bridge.queries)


def wrapped(config: LMMConfig, tokenizer: AnyTokenizer) -> PreTrainedTokenizerFast:
    """Converts a trained tokenizer to one for the prompts of an encoder, or of a decoder alone."""
    if config.encoder_decoder:
        return wrap(tokenizer, template="$A </s>")
    return wrap(tokenizer, template="<s> $A", bos_token="<s>", padding_side="left")
