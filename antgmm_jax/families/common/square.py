"""Square images as uint8 with the scale and offset that normalise them, and checks of processors."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import Lock
from typing import Any

import numpy as np
from transformers import ProcessorMixin

from antgmm_jax.config import LMMConfig
from antgmm_jax.errors import AntgmmError
from antgmm_jax.families.common.words import starts_itself

Tree = dict[str, np.ndarray]
_LOCK = Lock()
_BEFORE: list[int] = []
"""Threads that torch had before `one_thread`, for each caller that is in it."""


class SquarePictures:
    """Resizes images to one square size, one slot per image.

    Args:
        processor: processor of the model.

    Attributes:
        side: pixels per side.

    Raises:
        AntgmmError: the processor's images are not square.
    """

    def __init__(self, processor: ProcessorMixin):
        self._processor, self.side = processor.image_processor, side(processor)
        table = _table(processor)
        self._offset, self._scale = table[:, 0], ((table[:, 255] - table[:, 0]) / 255).astype(np.float32)
        # Images of the final size can skip the processor, unless it resizes to another size before cropping.
        self._keeps_final_size = {value for value in dict(self._processor.size).values() if value} == {self.side}
        self._has_usual_steps = _has_usual_steps(self._processor)

    def __call__(self, images: Sequence[np.ndarray]) -> Tree:
        """Resizes the images of one row.

        Args:
            images: uint8 [H, W, 3] each.

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
        if self._keeps_final_size and image.shape == (self.side, self.side, 3):
            return image
        image = np.require(image, requirements=["C", "W"])  # what torch takes
        with one_thread():
            return self._steps(image) if self._has_usual_steps else self._whole(image)

    def _steps(self, image: np.ndarray) -> np.ndarray:
        """The steps of the processor that change sizes, on channels as they lie in memory.

        The processor as a whole first copies them apart: an image of 672 x 504 pixels then takes 1.3 ms to become one
        of 336, here 0.4.
        """
        import torch

        images, pixels = self._processor, torch.from_numpy(image).permute(2, 0, 1)[None]
        if images.do_resize:
            pixels = images.resize(pixels, size=images.size, resample=images.resample)
        if images.do_center_crop:
            pixels = images.center_crop(pixels, images.crop_size)
        return pixels[0].permute(1, 2, 0).numpy()

    def _whole(self, image: np.ndarray) -> np.ndarray:
        """Runs the whole processor, without rescaling and normalising."""
        planes = np.ascontiguousarray(np.moveaxis(image, -1, 0))
        raw = {"do_rescale": False, "do_normalize": False, "input_data_format": "channels_first"}
        out = self._processor(planes, return_tensors="np", **raw)
        return np.moveaxis(np.asarray(out["pixel_values"])[0], 0, -1)


def _has_usual_steps(images: Any) -> bool:
    """Whether an image processor resizes, crops, rescales and normalises by torchvision, and does nothing else."""
    from transformers.image_processing_backends import TorchvisionBackend
    from transformers.image_utils import SizeDict

    steps = ("preprocess", "_preprocess", "process_image")
    usual = all(getattr(type(images), name) is getattr(TorchvisionBackend, name) for name in steps)
    return usual and not images.do_pad and isinstance(images.size, SizeDict)


@contextmanager
def one_thread() -> Iterator[None]:
    """Limits torch, with which image processors may resize, to one thread, for several callers at a time.

    Several threads read rows already. On two busy cores an image took 16 ms with torch's own threads and 1.6 ms with
    one.
    """
    torch = sys.modules.get("torch")
    if torch is None:
        yield
        return
    with _LOCK:
        own = torch.get_num_threads()  # a thread's first call takes the number set last, which is 1 within a caller
        _BEFORE.append(_BEFORE[-1] if _BEFORE else own)
        torch.set_num_threads(1)  # of the calling thread, and of those that begin later
    try:
        yield
    finally:
        with _LOCK:
            torch.set_num_threads(_BEFORE.pop())


def unscaled(processor: Any, text: str, images: Sequence[np.ndarray]) -> Any:
    """Runs a processor that also reads videos on a conversation, with pixels from 0 to 255.

    Args:
        processor: processor of the model.
        text: the conversation, rendered.
        images: uint8 [H, W, 3] each.

    Returns:
        Output of the processor, with `pixel_values` if there are images.

    Raises:
        AntgmmError: the text contains the token of a video.
    """
    if processor.video_token in text:
        raise AntgmmError(f"{processor.video_token} stands for a video, which is not supported: use images")
    options: dict[str, Any] = {"add_special_tokens": not starts_itself(processor, text)}
    if images:
        raw = [np.ascontiguousarray(np.moveaxis(image, -1, 0)) for image in images]
        plain = {"do_rescale": False, "do_normalize": False, "input_data_format": "channels_first"}
        options |= {"images": [raw], "return_tensors": "np", **plain}
    with one_thread():
        return processor(text=[text], **options)


def side(processor: ProcessorMixin) -> int:
    """Returns the side in pixels of a processor's square images.

    Raises:
        AntgmmError: its images are not square.
    """
    settings = processor.image_processor
    size = settings.crop_size if getattr(settings, "do_center_crop", False) else settings.size
    if not size.get("height") or size["height"] != size.get("width"):
        raise AntgmmError(f"the image processor makes images of size {dict(size)}: only square images are supported")
    return size["height"]


def _table(processor: ProcessorMixin) -> np.ndarray:
    """Normalised value of each of the 256 pixel values of each channel, float32 [3, 256]."""
    ramp = np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, axis=-1)
    settings = {"do_center_crop": False} if hasattr(processor.image_processor, "do_center_crop") else {}
    out = processor.image_processor(ramp, do_resize=False, return_tensors="np", **settings)
    return np.asarray(out["pixel_values"], np.float32)[0].reshape(3, 256)


def normalisation(images: Any) -> tuple[np.ndarray, np.ndarray]:
    """Scale and offset of each channel, float32 [3], from the settings of the image processor."""
    factor = np.full(3, images.rescale_factor if images.do_rescale else 1.0)
    mean, std = (images.image_mean, images.image_std) if images.do_normalize else (0.0, 1.0)
    return (factor / np.asarray(std)).astype(np.float32), np.full(3, -np.asarray(mean) / np.asarray(std), np.float32)


def check_processor(
    processor: ProcessorMixin,
    config: LMMConfig,
    *,
    kind: type[ProcessorMixin],
    fields: Sequence[str],
    size: Callable[[Any], tuple[int, int]],
    image_token: Callable[[Any], str] = lambda processor: str(processor.image_token),
    settings: str = "",
) -> None:
    """Checks that a processor makes the images and tokens that the model reads.

    Args:
        processor: processor of the checkpoint.
        config: model config.
        kind: class that it must have.
        fields: attributes that it must have: older releases of transformers did not save all of them.
        size: processor -> (pixels per side, tokens) of an image.
        image_token: processor -> the token that stands for a part of an image.
        settings: how to correct the number of tokens of an image, "" if no setting does.

    Raises:
        AntgmmError: the processor does not fit the model.
    """
    if not isinstance(processor, kind):
        raise AntgmmError(
            f"the model has a {type(processor).__name__} but needs a {kind.__name__}: save one in its folder"
        )
    if missing := [name for name in fields if getattr(processor, name) is None]:
        raise AntgmmError(
            f"the processor has no {missing[0]} (older releases of transformers did not save it):"
            " set it in processor_config.json to the model's value"
        )
    _check_tokenizer(processor.tokenizer, image_token(processor), config)
    made, read = size(processor), (config.side, config.image_tokens)
    if made != read:
        remedy = f"{settings}, or " if settings and made[0] == read[0] else ""
        raise AntgmmError(
            f"the processor makes images of {made[0]} pixels with {made[1]} tokens, the model reads"
            f" {read[0]} pixels and {read[1]} tokens: {remedy}save the model's own processor in its folder"
        )


def _check_tokenizer(tokenizer: Any, image_token: str, config: LMMConfig) -> None:
    """Checks that the tokenizer has a padding token, the model's image token and at most the model's vocabulary.

    Special tokens beyond the vocabulary do no harm: rows and requests may not contain them, and processors that have
    them replace them before they tokenize (`<video>` of the released InternVL3).
    """
    vocab = config.language.vocab
    if tokenizer.pad_token_id is None:
        raise AntgmmError("the tokenizer has no padding token: set pad_token in tokenizer_config.json")
    token = tokenizer.convert_tokens_to_ids(image_token)
    if token != config.image_token:
        raise AntgmmError(
            f"the processor's image token is {token}, the model's {config.image_token}:"
            " save the model's own processor in its folder, or correct image_token_index in config.json"
        )
    named = {tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id}
    beyond = {key for key, token in tokenizer.added_tokens_decoder.items() if key >= vocab and token.special}
    if (count := len(tokenizer) - len(beyond - named)) > vocab:
        raise AntgmmError(
            f"the tokenizer has {count} tokens, the model {vocab}: save the model's tokenizer in its folder"
        )
