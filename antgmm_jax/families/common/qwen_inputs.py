"""Inputs of the Qwen series: images near their own size, cut into squares, and one token per square."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from einops import rearrange
from transformers import ProcessorMixin, Qwen2VLImageProcessor

from antgmm_jax.blocks.grids import places
from antgmm_jax.blocks.packed import PackedConfig
from antgmm_jax.blocks.pictures import as_hf
from antgmm_jax.errors import AntgmmError
from antgmm_jax.families.common.square import Tree, check_processor, normalisation, one_thread
from antgmm_jax.families.common.words import AnyTokenizer, Messages, rendered, starts_itself, wrap

_START, _END, _VIDEO = "<|vision_start|>", "<|vision_end|>", "<|video_pad|>"
_LONGEST = 200  # the limit of the image processor
_NONE = {"pixel_values": (), "image_grid_thw": np.zeros((0, 3), int)}
_TURN, _TURN_END = "<|im_start|>", "<|im_end|>"
_SPECIAL = (_TURN, _TURN_END, _START, _END, _VIDEO)
_CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %} {% endif %}{% if message['content'] is string %}"
    "{{ message['content'] | replace('<image>\\n', '<|vision_start|><image><|vision_end|>') }}"
    "{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "<|vision_start|><image><|vision_end|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ eos_token if message['role'] == 'assistant' else '<|im_end|>' }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""An answer of an earlier turn is written as the model gave it: a space before it and the end token behind it.

Images in a turn that is a string: see `words.chat_template`.
"""


class QwenInputs:
    """Implements `antgmm_jax.families.base.Inputs`; a family's subclass names the class `kind` of its processor.

    Args:
        config: model config.
        processor: processor of the checkpoint.

    Raises:
        AntgmmError: the processor does not fit the model.
    """

    encoder_decoder = False
    kind: type[ProcessorMixin]

    def __init__(self, config: PackedConfig, processor: ProcessorMixin):
        check_processor(processor, config, kind=self.kind, fields=(), size=lambda p: (_side(p), 1))
        self.processor: Any = processor
        self._images, self._config = self.processor.image_processor, config.vision
        made = (self._images.merge_size, self._images.temporal_patch_size)
        if made != (read := (self._config.merge, self._config.frames)):
            raise AntgmmError(
                f"the processor's merge_size and temporal_patch_size are {made}, the model's {read}:"
                " save the model's own processor in its folder"
            )
        self._scale, self._offset = normalisation(self._images)

    def chat(self, messages: Messages) -> str:
        """Renders a conversation by the chat template, or in ChatML without a template."""
        image, end = f"{_START}{self.processor.image_token}{_END}", f"{_TURN_END}\n{_TURN}assistant\n"
        return rendered(self.processor, messages, lambda line, pictures: f"{_TURN}user\n{image * pictures}{line}{end}")

    def __call__(self, text: str, images: Sequence[np.ndarray]) -> tuple[np.ndarray, Tree]:
        """Token ids int32 [T] of a text, and the tree of images, [M, ...]: the squares of each image, row by row."""
        _check_row(text, images, self.processor.video_token)
        options: dict[str, Any] = {"add_special_tokens": not starts_itself(self.processor, text)}
        if images:
            raw = [np.ascontiguousarray(np.moveaxis(image, -1, 0)) for image in images]
            plain = {"do_rescale": False, "do_normalize": False, "input_data_format": "channels_first"}
            options |= {"images": raw, "return_tensors": "np", **plain}
        with one_thread():
            out = self.processor(text=[text], **options)
        return np.asarray(out["input_ids"][0], np.int32), self._squares(out if images else _NONE)

    def _squares(self, out: Mapping[str, Any]) -> Tree:
        """Converts the processor's patches and grids to the tree of squares."""
        config = self._config
        sides = {"y": config.merge, "x": config.merge, "t": config.frames, "py": config.patch, "px": config.patch}
        patches = np.asarray(out["pixel_values"]).reshape(-1, config.channels * config.frames * config.patch**2)
        # All frames of a patch are equal.
        squares = rearrange(patches, "(g y x) (c t py px) -> t g (y py) (x px) c", **sides)[0]
        sizes = np.asarray(out["image_grid_thw"]).reshape(-1, 3)[:, 1:] // config.merge
        place = [places(*size.tolist()) for size in sizes]
        return {
            "pixels": np.ascontiguousarray(squares.astype(np.uint8)),
            "scale": np.tile(self._scale, (len(squares), 1)),
            "offset": np.tile(self._offset, (len(squares), 1)),
            "place": np.concatenate([np.zeros((0, 4), np.int32), *place]),
        }

    @staticmethod
    def torch(batch: Mapping[str, Any], config: Any) -> Tree:
        """Converts images of a batch to the PyTorch model's patches and grids, and marks their tokens."""
        images, vision = batch["images"], config.vision_config
        valid = np.asarray(images["valid"])
        if not valid.any():
            return {}
        squares, place = as_hf(images), np.asarray(images["place"])[valid]
        merge, frames = vision.spatial_merge_size, vision.temporal_patch_size
        patches = rearrange(squares, "s c (y py) (x px) -> (s y x) c 1 py px", y=merge, x=merge)
        begins = (place[:, :2] == 0).all(axis=1)
        grids = np.pad(place[begins, 2:] * merge, ((0, 0), (1, 0)), constant_values=1)
        marks = np.asarray(batch["input_ids"]) == config.image_token_id
        return {
            "pixel_values": np.repeat(patches, frames, axis=2).reshape(len(patches), -1),
            "image_grid_thw": grids.astype(np.int64),
            "mm_token_type_ids": marks.astype(np.int64),
        }


def _side(processor: Any) -> int:
    """Pixels per side of a square."""
    return processor.image_processor.patch_size * processor.image_processor.merge_size


def _check_row(text: str, images: Sequence[np.ndarray], video: str) -> None:
    """Refuses videos, and images that the image processor cannot resize."""
    if video in text:
        raise AntgmmError(f"{video} is the token of a video, which is not supported: use images")
    for image in images:
        high, wide = image.shape[:2]
        if max(high, wide) > _LONGEST * min(high, wide):
            raise AntgmmError(f"an image of {wide} x {high} pixels: one side may be at most {_LONGEST} times the other")


def processor_of(
    config: PackedConfig, tokenizer: AnyTokenizer, kind: Callable[..., ProcessorMixin], video: Callable[..., Any]
) -> ProcessorMixin:
    """Creates the processor of a model that is trained from scratch; see `antgmm_jax.families.new_processor`.

    Args:
        config: model config; images have at most as many squares as the image of the usual size.
        tokenizer: trained tokenizer.
        kind: class of the processor.
        video: class of its video processor.

    Returns:
        The processor.
    """
    tokens = {"image_token": "<image>", "video_token": _VIDEO, "vision_start_token": _START, "vision_end_token": _END}
    words = wrap(tokenizer, template="$A", padding_side="left", extra_special_tokens=tokens)
    words.add_special_tokens({"additional_special_tokens": [*_SPECIAL]})
    square = (config.vision.patch * config.vision.merge) ** 2
    about: dict[str, Any] = {
        "patch_size": config.vision.patch,
        "merge_size": config.vision.merge,
        "temporal_patch_size": config.vision.frames,
        "size": {"shortest_edge": square, "longest_edge": config.slots * square},
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    return kind(
        image_processor=Qwen2VLImageProcessor(**about),
        tokenizer=words,
        video_processor=video(**about),
        chat_template=_CHAT,
    )
