"""Inputs of LLaVA-OneVision: tiles of images of any size, and one token per state or newline."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int
from transformers import (
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    ProcessorMixin,
)
from transformers.image_processing_utils import select_best_resolution

from antgmm_jax.blocks.pictures import as_hf
from antgmm_jax.errors import AntgmmError
from antgmm_jax.families.common.square import Tree, check_processor, normalisation, side, unscaled
from antgmm_jax.families.common.words import CHAT, AnyTokenizer, Messages, rendered, wrap
from antgmm_jax.families.llava_onevision import tiles
from antgmm_jax.families.llava_onevision.config import LlavaOnevisionConfig

_VIDEO = "<video>"


class Inputs:
    """Implements `antgmm_jax.families.base.Inputs`.

    Args:
        config: model config.
        processor: processor of the checkpoint.

    Raises:
        AntgmmError: the processor does not fit the model.
    """

    encoder_decoder = False

    def __init__(self, config: LlavaOnevisionConfig, processor: ProcessorMixin):
        fields, size = ("num_image_tokens",), lambda p: (side(p), p.num_image_tokens)
        check_processor(processor, config, kind=LlavaOnevisionProcessor, fields=fields, size=size)
        self.processor: Any = processor
        self._config = config
        _check_tiling(self.processor, config)
        self._scale, self._offset = normalisation(self.processor.image_processor)

    def chat(self, messages: Messages) -> str:
        """Renders a conversation by the chat template, or in ChatML without a template."""
        image = f"{self.processor.image_token}\n"

        def plain(line: str, pictures: int) -> str:
            return f"<|im_start|>user {image * pictures}{line}<|im_end|><|im_start|>assistant\n"

        return rendered(self.processor, messages, plain)

    def __call__(self, text: str, images: Sequence[np.ndarray]) -> tuple[np.ndarray, Tree]:
        """Token ids int32 [T] of a text, and the tree of images, [M, ...]: the tiles of each image."""
        place = [place_of(self._config, image.shape[:2], alone=len(images) == 1) for image in images]
        out = unscaled(self.processor, text, images)
        made = np.asarray(out["pixel_values"]) if images else ()
        return np.asarray(out["input_ids"][0], np.int32), self._tree(made, place)

    def _tree(self, made: Sequence[np.ndarray] | np.ndarray, place: list[np.ndarray]) -> Tree:
        """Joins the tiles of all images, without those that pad an image to the number of another's."""
        px = self._config.vision.image
        used = [tile[: len(own)] for tile, own in zip(made, place, strict=True)]
        pixels = np.moveaxis(np.concatenate([np.zeros((0, 3, px, px), np.uint8), *used]), 1, -1)
        return {
            "pixels": np.ascontiguousarray(pixels.astype(np.uint8)),
            "scale": np.tile(self._scale, (len(pixels), 1)),
            "offset": np.tile(self._offset, (len(pixels), 1)),
            "place": np.concatenate([np.zeros((0, tiles.COLUMNS), np.int32), *place]),
        }

    @staticmethod
    def torch(batch: Mapping[str, Any], config: Any) -> Tree:
        """Converts images of a batch to the PyTorch model's tiles [K, T, C, H, W], sizes and images of each row."""
        del config
        images, valid = batch["images"], np.asarray(batch["images"]["valid"])
        if not valid.any():
            return {}
        made, sizes, counts, start = [], [], [], 0
        all_tiles = as_hf(images)
        for place in (row[used] for row, used in zip(np.asarray(images["place"]), valid, strict=True)):
            own = tiles.images_of(place)
            made += [all_tiles[start + image.start : start + image.stop] for image in own]
            sizes += [place[image.start, 4:6] for image in own]
            counts += [len(own)] if own else []
            start += len(place)
        pixels = np.zeros((len(made), max(map(len, made)), *all_tiles.shape[1:]), np.float32)
        for target, image in zip(pixels, made, strict=True):
            target[: len(image)] = image
        numbers = {"image_sizes": np.stack(sizes), "batch_num_images": np.array(counts)}
        return {"pixel_values": pixels, **{name: value.astype(np.int64) for name, value in numbers.items()}}


def place_of(config: LlavaOnevisionConfig, size: tuple[int, int], *, alone: bool) -> Int[np.ndarray, "M 13"]:
    """Returns the `place` of each tile of an image.

    Args:
        config: model config.
        size: height and width of the image.
        alone: whether it is the only image of its row.

    Raises:
        AntgmmError: nothing of a long image would be left.
    """
    grid, px = config.patches_per_side, config.vision.image
    if not alone:
        return tiles.base(size, grid, 1)
    high, wide = select_best_resolution(size, [*config.resolutions])
    enlarged = tiles.group(size, (high // px, wide // px), grid, config.most_tiles)
    if enlarged[0, 8:10].all() and not enlarged[0, 10:12].all():
        raise AntgmmError(f"an image of {size[1]} x {size[0]} pixels is too long to be shrunk: crop it")
    return np.concatenate([tiles.base(size, grid, 0), enlarged])


def _check_tiling(processor: Any, config: LlavaOnevisionConfig) -> None:
    """Refuses a processor that makes other tiles or tokens than the model reads."""
    points = [list(resolution) for resolution in config.resolutions]
    made = [list(point) for point in processor.image_processor.image_grid_pinpoints]
    for name, theirs, ours in (
        ("image_grid_pinpoints", made, points),
        ("vision_aspect_ratio", processor.vision_aspect_ratio, f"anyres_max_{config.most_tiles}"),
    ):
        if theirs != ours:
            raise AntgmmError(
                f"the processor's {name} is {theirs}, the model's {ours}: save the model's own processor in its folder"
            )


def new_processor(config: LlavaOnevisionConfig, tokenizer: AnyTokenizer) -> LlavaOnevisionProcessor:
    """Creates the processor of a model that is trained from scratch; see `antgmm_jax.families.new_processor`."""
    tokens = {"image_token": "<image>", "video_token": _VIDEO}
    words = wrap(tokenizer, template="$A", bos_token="<s>", padding_side="left", extra_special_tokens=tokens)
    size = {"height": config.vision.image, "width": config.vision.image}
    points = [list(resolution) for resolution in config.resolutions]
    return LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=points),
        words,
        LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=config.image_tokens,
        vision_feature_select_strategy="full",
        vision_aspect_ratio=f"anyres_max_{config.most_tiles}",
        chat_template=CHAT,
    )
