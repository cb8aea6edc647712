"""What Idefics3 and SmolVLM read of a record: tiles of its pictures, and their tokens with rows and columns."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from transformers import (
    Idefics3ImageProcessor,
    Idefics3Processor,
    ProcessorMixin,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)

from antgmm_jax.blocks.pictures import as_hf
from antgmm_jax.errors import AntgmmError
from antgmm_jax.families.idefics3.config import Idefics3Config
from antgmm_jax.families.square import Tree, check_fields, check_size, check_words, one_thread
from antgmm_jax.families.words import CHAT, starts_itself, user_turn, wrap

_CLASSES = {"idefics3": Idefics3Processor, "smolvlm": SmolVLMProcessor}
_SPECIAL = ("<fake_token_around_image>", "<end_of_utterance>", "<global-img>")


class Inputs:
    """Records as their own processor makes them, `antgmm_jax.families.base.Inputs`.

    Args:
        config: the model.
        processor: of its checkpoint.

    Raises:
        AntgmmError: the processor makes other pictures or tokens than the model reads.
    """

    encoder_decoder = False

    def __init__(self, config: Idefics3Config, processor: ProcessorMixin):
        wanted = _CLASSES[config.model_type]
        if not isinstance(processor, wanted):
            raise AntgmmError(
                f"a {type(processor).__name__} is not what this model reads by: save its {wanted.__name__}"
            )
        self.processor: Any = processor
        check_fields(processor, ("image_seq_len",))
        check_words(processor, self.processor.image_token, config.image_token, config.language.vocab)
        self._images = processor.image_processor
        side = dict(self._images.max_image_size)["longest_edge"]
        check_size((side, self.processor.image_seq_len), (config.vision.image, config.image_tokens))
        self._scale, self._offset = _normalising(self._images)

    def prompt(self, line: str, pictures: int) -> str:
        """The text given to the processor: the user's turn by the chat template, or the classic prompt without one."""
        classic = "User:" + self.processor.image_token * pictures + f"{line}<end_of_utterance>\nAssistant:"
        return user_turn(self.processor, line, pictures) or classic

    def __call__(self, line: str, images: Sequence[np.ndarray]) -> tuple[np.ndarray, Tree]:
        """Prompt token ids int32 [T], and the pictures' tree, [M, ...]: of each its tiles, then the whole."""
        text = self.prompt(line, len(images))
        given: dict[str, Any] = {"add_special_tokens": not starts_itself(self.processor, text)}
        if images:
            given |= {"images": [[*images]], "do_rescale": False, "do_normalize": False, "return_tensors": "np"}
        with one_thread():
            made = self.processor(text=[text], **given)
        side = self._images.max_image_size["longest_edge"]
        tiles = np.asarray(made["pixel_values"])[0] if images else np.zeros((0, 3, side, side))
        pixels = np.ascontiguousarray(np.moveaxis(tiles, 1, -1).astype(np.uint8))
        tree = {"pixels": pixels} | {
            name: np.tile(row, (len(pixels), 1)) for name, row in (("scale", self._scale), ("offset", self._offset))
        }
        return np.asarray(made["input_ids"][0], np.int32), tree

    @staticmethod
    def torch(images: Mapping[str, np.ndarray]) -> Tree:
        """A batch's tiles as the PyTorch model takes them: `pixel_values` [B, M, C, H, W], empty slots zero."""
        valid = np.asarray(images["valid"])
        if not valid.any():
            return {}
        tiles = as_hf(images)
        pixels = np.zeros((*valid.shape, *tiles.shape[1:]), np.float32)
        pixels[valid] = tiles
        return {"pixel_values": pixels}


def _normalising(images: Any) -> tuple[np.ndarray, np.ndarray]:
    """Scale and offset of each channel, float32 [3], as the image processor's settings say."""
    factor = np.full(3, images.rescale_factor if images.do_rescale else 1.0)
    mean, std = (images.image_mean, images.image_std) if images.do_normalize else (0.0, 1.0)
    return (factor / np.asarray(std)).astype(np.float32), np.full(3, -np.asarray(mean) / np.asarray(std), np.float32)


def new_processor(config: Idefics3Config, tokenizer: Tokenizer) -> ProcessorMixin:
    """The processor of a model that is trained from scratch; `save_pretrained` writes what `AutoProcessor` reads.

    Args:
        config: the model; a picture is one tile.
        tokenizer: a trained one that has the tokens of `antgmm_jax.families.words`.

    Returns:
        The processor.
    """
    words = wrap(tokenizer, template="<s> $A", bos_token="<s>", padding_side="left")
    words.add_special_tokens({"additional_special_tokens": ["<image>", *_SPECIAL]})
    smol, edge = config.model_type == "smolvlm", {"longest_edge": config.vision.image}
    kind = SmolVLMImageProcessor if smol else Idefics3ImageProcessor
    about: dict[str, Any] = {"size": edge, "max_image_size": edge, "do_image_splitting": False}
    rest: dict[str, Any] = {"image_seq_len": config.image_tokens, "chat_template": CHAT}
    if smol:
        rest["video_processor"] = SmolVLMVideoProcessor(size=edge, max_image_size=edge)
    return _CLASSES[config.model_type](image_processor=kind(**about), tokenizer=words, **rest)
