"""Inputs of Mistral 3: images near their own size, cut into squares; each row of squares ends with a token."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from einops import rearrange
from transformers import PixtralImageProcessor, PixtralProcessor, ProcessorMixin

from antgmm_jax.blocks.grids import places
from antgmm_jax.blocks.pictures import as_hf
from antgmm_jax.errors import AntgmmError
from antgmm_jax.families.common.square import Tree, check_processor, normalisation, one_thread
from antgmm_jax.families.common.words import CHAT, AnyTokenizer, Messages, rendered, starts_itself, wrap
from antgmm_jax.families.mistral3.config import Mistral3Config

_BREAK, _END = "[IMG_BREAK]", "[IMG_END]"


class Inputs:
    """Implements `antgmm_jax.families.base.Inputs`.

    Args:
        config: model config.
        processor: processor of the checkpoint.

    Raises:
        AntgmmError: the processor does not fit the model.
    """

    encoder_decoder = False

    def __init__(self, config: Mistral3Config, processor: ProcessorMixin):
        check_processor(processor, config, kind=PixtralProcessor, fields=(), size=lambda p: (_side(p), 1))
        self.processor: Any = processor
        made, read = self.processor.spatial_merge_size, config.vision.merge
        if made != read:
            raise AntgmmError(
                f"the processor's spatial_merge_size is {made}, the model's {read}:"
                " save the model's own processor in its folder"
            )
        images = self.processor.image_processor
        self._scale, self._offset = normalisation(images)
        self._side, self._longest = config.side, images.size["longest_edge"]

    def chat(self, messages: Messages) -> str:
        """Renders a conversation by the chat template, or as Mistral's instruction without a template."""
        image = self.processor.image_token
        return rendered(self.processor, messages, lambda line, pictures: f"[INST]{image * pictures}{line}[/INST]")

    def __call__(self, text: str, images: Sequence[np.ndarray]) -> tuple[np.ndarray, Tree]:
        """Token ids int32 [T] of a text, and the tree of images, [M, ...]: the squares of each image, row by row."""
        options: dict[str, Any] = {"add_special_tokens": not starts_itself(self.processor, text)}
        if images:
            for image in images:
                self._check(image)
            raw = [np.ascontiguousarray(np.moveaxis(image, -1, 0)) for image in images]
            plain = {"do_rescale": False, "do_normalize": False, "input_data_format": "channels_first"}
            options |= {"images": raw, **plain}
        with one_thread():
            out = self.processor(text=[text], return_tensors="np", **options)
        return np.asarray(out["input_ids"][0], np.int32), self._squares(out if images else {})

    def _check(self, image: np.ndarray) -> None:
        """Refuses images whose shorter side the image processor would make 0 pixels long."""
        high, wide = image.shape[:2]
        if max(high, wide) > self._longest * min(high, wide):
            raise AntgmmError(
                f"an image of {wide} x {high} pixels: one side may be at most {self._longest} times the other"
            )

    def _squares(self, out: Mapping[str, Any]) -> Tree:
        """Converts the processor's padded images and their sizes to the tree of squares."""
        side, squares, place = self._side, [], [np.zeros((0, 4), np.int32)]
        for image, (high, wide) in zip(out.get("pixel_values", ()), out.get("image_sizes", ()), strict=True):
            own = np.asarray(image)[:, :high, :wide].astype(np.uint8)
            squares.append(rearrange(own, "c (gy y) (gx x) -> (gy gx) y x c", y=side, x=side))
            place.append(places(int(high) // side, int(wide) // side))
        pixels = np.concatenate([np.zeros((0, side, side, 3), np.uint8), *squares])
        return {
            "pixels": pixels,
            "scale": np.tile(self._scale, (len(pixels), 1)),
            "offset": np.tile(self._offset, (len(pixels), 1)),
            "place": np.concatenate(place),
        }

    @staticmethod
    def torch(batch: Mapping[str, Any], config: Any) -> Tree:
        """Converts images of a batch to the PyTorch model's padded images and their sizes."""
        del config
        images = batch["images"]
        valid = np.asarray(images["valid"])
        if not valid.any():
            return {}
        squares, place = as_hf(images), np.asarray(images["place"])[valid]
        begins = np.flatnonzero((place[:, :2] == 0).all(axis=1))
        grids, side = place[begins, 2:], squares.shape[-1]
        whole = np.zeros((len(begins), squares.shape[1], *(side * grids.max(axis=0))), np.float32)
        for image, begin, (rows, columns) in zip(whole, begins, grids, strict=True):
            own = rearrange(squares[begin : begin + rows * columns], "(gy gx) c y x -> c (gy y) (gx x)", gx=columns)
            image[:, : side * rows, : side * columns] = own
        return {"pixel_values": whole, "image_sizes": (side * grids).astype(np.int64)}


def _side(processor: Any) -> int:
    """Pixels per side of a square."""
    return processor.patch_size * processor.spatial_merge_size


def new_processor(config: Mistral3Config, tokenizer: AnyTokenizer) -> PixtralProcessor:
    """Creates the processor of a model that is trained from scratch; see `antgmm_jax.families.new_processor`."""
    vision, image = config.vision, {"image_token": "<image>"}
    words = wrap(tokenizer, template="$A", bos_token="<s>", padding_side="left", extra_special_tokens=image)
    words.add_special_tokens({"additional_special_tokens": [_BREAK, _END]})
    square = vision.patch * vision.merge
    return PixtralProcessor(
        PixtralImageProcessor(size={"longest_edge": vision.image}, patch_size={"height": square, "width": square}),
        words,
        patch_size=vision.patch,
        spatial_merge_size=vision.merge,
        chat_template=CHAT,
        image_token="<image>",
        image_break_token=_BREAK,
        image_end_token=_END,
    )
