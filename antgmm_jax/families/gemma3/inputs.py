"""Inputs of Gemma 3 (square images, each with its tokens between two marks), and the processor of a new model."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from transformers import Gemma3ImageProcessor, Gemma3Processor, ProcessorMixin

from antgmm_jax.blocks.pictures import as_hf
from antgmm_jax.errors import AntgmmError
from antgmm_jax.families.common.square import SquarePictures, Tree, check_processor, side
from antgmm_jax.families.common.words import AnyTokenizer, Messages, chat_template, rendered, starts_itself, wrap
from antgmm_jax.families.gemma3.config import Gemma3Config

_START, _END = "<start_of_image>", "<end_of_image>"
_TURN, _TURN_END = "<start_of_turn>", "<end_of_turn>"


class Inputs:
    """Implements `antgmm_jax.families.base.Inputs`.

    Args:
        config: model config.
        processor: processor of the checkpoint.

    Raises:
        AntgmmError: the processor does not fit the model.
    """

    encoder_decoder = False

    def __init__(self, config: Gemma3Config, processor: ProcessorMixin):
        check_processor(
            processor,
            config,
            kind=Gemma3Processor,
            fields=("image_seq_length",),
            size=lambda p: (side(p), p.image_seq_length),
            image_token=lambda p: p.tokenizer.image_token,
        )
        self.processor: Any = processor
        if self.processor.image_processor.do_pan_and_scan:
            where = "processor_config.json (image_processor), or preprocessor_config.json without such a part"
            raise AntgmmError(f"do_pan_and_scan = true is not supported: set it to false in {where}")
        self._images = SquarePictures(processor)

    def chat(self, messages: Messages) -> str:
        """Renders a conversation by the chat template, or as one of Gemma's turns."""
        image, end = self.processor.boi_token, f"{_TURN_END}\n{_TURN}model\n"
        return rendered(self.processor, messages, lambda line, n: f"{_TURN}user\n{image * n}{line}{end}")

    def __call__(self, text: str, images: Sequence[np.ndarray]) -> tuple[np.ndarray, Tree]:
        """Token ids int32 [T] of a text, and the tree of images, [M, ...]."""
        text = text.replace(self.processor.boi_token, self.processor.full_image_sequence)
        add_start = not starts_itself(self.processor, text)
        ids = self.processor.tokenizer(text, add_special_tokens=add_start)["input_ids"]
        return np.array(ids, np.int32), self._images(images)

    @staticmethod
    def torch(batch: Mapping[str, Any], config: Any) -> Tree:
        """Converts images of a batch to arguments of the PyTorch model, and marks their tokens."""
        marks = np.asarray(batch["input_ids"]) == config.image_token_id
        pictures = {"pixel_values": as_hf(batch["images"])} if np.asarray(batch["images"]["valid"]).any() else {}
        return {**pictures, "token_type_ids": marks.astype(np.int64)}


def new_processor(config: Gemma3Config, tokenizer: AnyTokenizer) -> Gemma3Processor:
    """Creates the processor of a model that is trained from scratch; see `antgmm_jax.families.new_processor`."""
    size = {"height": config.vision.image, "width": config.vision.image}
    tokens = {"image_token": "<image>", "boi_token": _START, "eoi_token": _END}
    words = wrap(tokenizer, template="$A", bos_token="<s>", padding_side="left", extra_special_tokens=tokens)
    words.add_special_tokens({"additional_special_tokens": [_START, _END]})
    words.add_tokens(["\n" * count for count in range(1, 5)])  # vLLM expects them of every Gemma 3
    return Gemma3Processor(
        Gemma3ImageProcessor(size=size, do_pan_and_scan=False),
        words,
        image_seq_length=config.image_tokens,
        chat_template=chat_template(_START),
    )
