"""Square pictures as a processor makes them: uint8 on the host, and the line that normalises each channel."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from transformers import ProcessorMixin

from antgmm_jax.errors import AntgmmError

Tree = dict[str, np.ndarray]


class SquarePictures:
    """Pictures of one size, each a slot of its own.

    Args:
        processor: the model's.

    Attributes:
        side: pixels of a side.

    Raises:
        AntgmmError: the processor makes pictures that are not square.
    """

    def __init__(self, processor: ProcessorMixin):
        self._processor, self.side = processor.image_processor, side(processor)
        table = _table(processor)
        self._offset, self._scale = table[:, 0], ((table[:, 255] - table[:, 0]) / 255).astype(np.float32)
        # Where pictures are resized to more than they are cropped to, none is left as it is.
        self._kept = {value for value in dict(self._processor.size).values() if value} == {self.side}

    def __call__(self, images: Sequence[np.ndarray]) -> Tree:
        """A row's pictures.

        Args:
            images: each uint8 [H, W, 3].

        Returns:
            `pixels` uint8 [M, side, side, 3], `scale` and `offset` float32 [M, 3].
        """
        pixels = np.empty((len(images), self.side, self.side, 3), np.uint8)
        for slot, image in zip(pixels, images, strict=True):
            slot[:] = self._resized(image)
        return {
            "pixels": pixels,
            "scale": np.tile(self._scale, (len(images), 1)),
            "offset": np.tile(self._offset, (len(images), 1)),
        }

    def _resized(self, image: np.ndarray) -> np.ndarray:
        if self._kept and image.shape == (self.side, self.side, 3):
            return image
        # Channels first and in one piece, torchvision need not copy them.
        planes = np.ascontiguousarray(np.moveaxis(image, -1, 0))
        raw = {"do_rescale": False, "do_normalize": False, "input_data_format": "channels_first"}
        with one_thread():
            made = self._processor(planes, return_tensors="np", **raw)
        return np.moveaxis(np.asarray(made["pixel_values"])[0], 0, -1)


@contextmanager
def one_thread() -> Iterator[None]:
    """Keeps torch, which image processors may resize with, from sharing out one picture.

    Rows are read in threads already: its own wait for each other where the cores are taken. On two cores with other
    work a picture took 16 ms so, and 1.6 ms in one thread.
    """
    torch = sys.modules.get("torch")
    before = torch.get_num_threads() if torch else 0
    if torch:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if torch:
            torch.set_num_threads(before)


def side(processor: ProcessorMixin) -> int:
    """Side in pixels of the square picture that a processor makes.

    Raises:
        AntgmmError: it makes other pictures.
    """
    settings = processor.image_processor
    size = settings.crop_size if getattr(settings, "do_center_crop", False) else settings.size
    if not size.get("height") or size["height"] != size.get("width"):
        raise AntgmmError(f"the image processor makes pictures of {dict(size)}: only squares are supported")
    return size["height"]


def _table(processor: ProcessorMixin) -> np.ndarray:
    """What the processor makes of each of the 256 values of each channel, float32 [3, 256]."""
    ramp = np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, axis=-1)
    settings = {"do_center_crop": False} if hasattr(processor.image_processor, "do_center_crop") else {}
    made = processor.image_processor(ramp, do_resize=False, return_tensors="np", **settings)
    return np.asarray(made["pixel_values"], np.float32)[0].reshape(3, 256)


def check_words(processor: ProcessorMixin, picture: str, token: int | None, vocab: int) -> None:
    """Refuses a tokenizer that is not its model's.

    Args:
        processor: of a checkpoint.
        picture: what stands for a part of a picture in a prompt.
        token: the id that the model looks for there.
        vocab: tokens that the model has.

    Raises:
        AntgmmError: another token stands for pictures, there are more tokens than the model has, or none that pads.
    """
    words = processor.tokenizer
    if words.pad_token_id is None:
        raise AntgmmError("the tokenizer has no token that pads: set pad_token in tokenizer_config.json to one it has")
    written = words.convert_tokens_to_ids(picture)
    if written != token:
        raise AntgmmError(
            f"the processor writes token {written} where the picture stands, the model looks for {token}:"
            " save the model's own processor beside it, or mend image_token_index in config.json"
        )
    if len(words) > vocab:
        raise AntgmmError(f"the tokenizer has {len(words)} tokens, the model {vocab}: save its own tokenizer beside it")


def check_fields(processor: ProcessorMixin, names: Sequence[str]) -> None:
    """Refuses a processor that lacks fields, as older releases of transformers saved them."""
    if absent := [name for name in names if getattr(processor, name) is None]:
        raise AntgmmError(
            f"the processor has no {absent[0]}, as those that older releases of transformers saved: set it in"
            " processor_config.json to the model's"
        )


def check_size(found: tuple[int, int], wanted: tuple[int, int]) -> None:
    """Refuses pictures of another side, or of another number of tokens, than a model reads: (pixels, tokens)."""
    if found != wanted:
        raise AntgmmError(
            f"the processor makes pictures of {found[0]} pixels that take {found[1]} tokens, the model reads"
            f" {wanted[0]} and {wanted[1]}: save the model's own processor beside it"
        )
