"""What LLaVA reads of a record: its chat template's user turn, pictures first; and the processor of a new model."""

from collections.abc import Mapping, Sequence

import numpy as np
from tokenizers import Tokenizer
from transformers import CLIPImageProcessor, LlavaProcessor, ProcessorMixin

from antgmm_jax.errors import AntgmmError
from antgmm_jax.families.llava.config import LlavaConfig
from antgmm_jax.families.square import (
    SquarePictures,
    Tree,
    check_fields,
    check_size,
    check_words,
    side,
)
from antgmm_jax.families.words import CHAT, starts_itself, user_turn, wrap
from antgmm_jax.pictures import as_hf


class Inputs:
    """Records as its own processor makes them, `antgmm_jax.families.base.Inputs`.

    Args:
        config: the model.
        processor: of its checkpoint.

    Raises:
        AntgmmError: the processor makes other pictures or tokens than the model reads.
    """

    encoder_decoder = False

    def __init__(self, config: LlavaConfig, processor: ProcessorMixin):
        if not isinstance(processor, LlavaProcessor):
            raise AntgmmError(f"a {type(processor).__name__} is not what LLaVA reads by: save its LlavaProcessor")
        self.processor, self._picture = processor, processor.image_token
        check_fields(processor, ("patch_size", "vision_feature_select_strategy"))
        check_words(processor, self._picture, config.image_token, config.language.vocab)
        self._pictures, self._count = SquarePictures(processor), _tokens(processor)
        check_size((self._pictures.side, self._count), (config.vision.image, config.image_tokens))

    def prompt(self, line: str, pictures: int) -> str:
        """The text given to the processor: the user's turn by the chat template, or the classic prompt without one."""
        classic = "USER: " + f"{self._picture}\n" * pictures + f"{line} ASSISTANT:"
        return user_turn(self.processor, line, pictures) or classic

    def __call__(self, line: str, images: Sequence[np.ndarray]) -> tuple[np.ndarray, Tree]:
        """Prompt token ids int32 [T] and the pictures' tree, [M, ...]."""
        text = self.prompt(line, len(images)).replace(self._picture, self._picture * self._count)
        words = self.processor.tokenizer
        ids = words(text, add_special_tokens=not starts_itself(self.processor, text))["input_ids"]
        return np.array(ids, np.int32), self._pictures(images)

    def torch(self, images: Mapping[str, np.ndarray]) -> Tree:
        """A batch's pictures as the PyTorch model takes them."""
        return {"pixel_values": as_hf(images)}


def _tokens(processor: LlavaProcessor) -> int:
    """How many text positions a picture takes."""
    patches = (side(processor) // int(processor.patch_size or 1)) ** 2
    count = patches + processor.num_additional_image_tokens
    return count - (processor.vision_feature_select_strategy == "default")


def new_processor(config: LlavaConfig, tokenizer: Tokenizer) -> LlavaProcessor:
    """The processor of a model that is trained from scratch; `save_pretrained` writes what `AutoProcessor` reads.

    Args:
        config: the model, with a CLIP tower whose class token is dropped.
        tokenizer: a trained one that has the tokens of `antgmm_jax.families.words`.

    Returns:
        The processor.
    """
    px, image = config.vision.image, {"image_token": "<image>"}
    words = wrap(tokenizer, template="<s> $A", bos_token="<s>", padding_side="left", extra_special_tokens=image)
    return LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": px}, crop_size={"height": px, "width": px}),
        words,
        patch_size=config.vision.patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT,
    )
