"""What BLIP-2 with T5 reads of a record: pictures as query tokens, then the question; and a new model's processor."""

from collections.abc import Mapping, Sequence

import numpy as np
from tokenizers import Tokenizer
from transformers import Blip2Processor, BlipImageProcessor, ProcessorMixin

from antgmm_jax.errors import AntgmmError
from antgmm_jax.families.blip2_t5.config import Blip2T5Config
from antgmm_jax.families.square import SquarePictures, Tree, check_fields, check_size, check_words
from antgmm_jax.families.words import wrap
from antgmm_jax.pictures import as_hf


class Inputs:
    """Records as its own processor makes them, `antgmm_jax.families.base.Inputs`.

    Args:
        config: the model.
        processor: of its checkpoint.

    Raises:
        AntgmmError: the processor makes other pictures or tokens than the model reads.
    """

    encoder_decoder = True

    def __init__(self, config: Blip2T5Config, processor: ProcessorMixin):
        if not isinstance(processor, Blip2Processor):
            raise AntgmmError(f"a {type(processor).__name__} is not what BLIP-2 reads by: save its Blip2Processor")
        self.processor = processor
        check_fields(processor, ("num_query_tokens",))
        check_words(processor, processor.image_token.content, config.image_token, config.language.vocab)
        self._pictures, self._count = SquarePictures(processor), int(processor.num_query_tokens or 0)
        check_size((self._pictures.side, self._count), (config.vision.image, config.image_tokens))
        self._token = config.image_token

    def prompt(self, line: str, pictures: int) -> str:
        """The text given to the processor: it puts the pictures' tokens before it by itself."""
        del pictures
        return line

    def __call__(self, line: str, images: Sequence[np.ndarray]) -> tuple[np.ndarray, Tree]:
        """Prompt token ids int32 [T] and the pictures' tree, [M, ...]."""
        ids = [self._token] * (self._count * len(images)) + self.processor.tokenizer(line)["input_ids"]
        return np.array(ids, np.int32), self._pictures(images)

    def torch(self, images: Mapping[str, np.ndarray]) -> Tree:
        """A batch's pictures as the PyTorch model takes them."""
        return {"pixel_values": as_hf(images)}


def new_processor(config: Blip2T5Config, tokenizer: Tokenizer) -> Blip2Processor:
    """The processor of a model that is trained from scratch; `save_pretrained` writes what `AutoProcessor` reads.

    Args:
        config: the model.
        tokenizer: a trained one that has the tokens of `antgmm_jax.families.words`.

    Returns:
        The processor.
    """
    px = config.vision.image
    images = BlipImageProcessor(size={"height": px, "width": px})
    return Blip2Processor(images, wrap(tokenizer, template="$A </s>"), num_query_tokens=config.bridge.queries)
