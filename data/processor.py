"""Hugging Face processors, and their exact pictures without their cost: uint8 once, normalised on the device."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from transformers import Blip2Processor, BlipImageProcessor, CLIPImageProcessor, LlavaProcessor, ProcessorMixin

from antgmm_jax.config import LMMConfig
from antgmm_jax.errors import AntgmmError
from data.record import Arrays, Record
from data.tokenizer import wrap

# Plain text around the image, so that servers which need a chat template accept an exported model.
_CHAT = (
    "{% for message in messages %}{% if message['content'] is string %}{{ message['content'] }} {% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} "
    "{% endif %}{% endfor %}{% endif %}{% endfor %}{% if add_generation_prompt %}answer:{% endif %}"
)


def blip2_processor(tokenizer: Tokenizer, *, px: int, queries: int) -> Blip2Processor:
    """The processor of a BLIP-2 + T5 model: pictures of `px` pixels, `queries` placeholder tokens before the text.

    Args:
        tokenizer: from `data.tokenizer.train_tokenizer`.
        px: side of the picture in pixels.
        queries: the Q-Former's queries.

    Returns:
        A processor; `save_pretrained` writes what `AutoProcessor` reads back offline.
    """
    images = BlipImageProcessor(size={"height": px, "width": px})
    return Blip2Processor(images, wrap(tokenizer, template="$A </s>"), num_query_tokens=queries)


def llava_processor(tokenizer: Tokenizer, *, px: int, patch: int) -> LlavaProcessor:
    """The processor of a LLaVA model with a CLIP tower whose class token is dropped.

    Args:
        tokenizer: from `data.tokenizer.train_tokenizer`.
        px: side of the picture in pixels, a multiple of `patch`.
        patch: side of a patch in pixels.

    Returns:
        A processor; `save_pretrained` writes what `AutoProcessor` reads back offline.
    """
    images = CLIPImageProcessor(size={"shortest_edge": px}, crop_size={"height": px, "width": px})
    words = wrap(
        tokenizer,
        template="<s> $A",
        bos_token="<s>",
        padding_side="left",
        extra_special_tokens={"image_token": "<image>"},
    )
    return LlavaProcessor(
        images,
        words,
        patch_size=patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_CHAT,
    )


def side(processor: ProcessorMixin) -> int:
    """Side in pixels of the square picture that a processor makes."""
    settings = processor.image_processor
    size = settings.crop_size if getattr(settings, "do_center_crop", False) else settings.size
    if not size.get("height") or size["height"] != size.get("width"):
        raise AntgmmError(f"the image processor makes pictures of {dict(size)}: only squares are supported")
    return size["height"]


def _picture(processor: ProcessorMixin, image: np.ndarray, px: int) -> np.ndarray:
    # Where pictures are resized to more than they are cropped to, none is left as it is.
    resized = {value for value in dict(processor.image_processor.size).values() if value}
    if image.shape == (px, px, 3) and resized == {px}:
        return image
    made = processor.image_processor(image, do_rescale=False, do_normalize=False, return_tensors="np")
    return np.moveaxis(np.asarray(made["pixel_values"])[0], 0, -1)


class Prepared(list[Record]):
    """Records whose pictures are the rows of one array, `images` uint8 [N, px, px, 3], at the model's size."""

    def __init__(self, records: Sequence[Record], images: np.ndarray):
        super().__init__(records)
        self.images = images


def prepare(processor: ProcessorMixin, records: Sequence[Record]) -> Prepared:
    """Records with their pictures as the model sees them, so that each picture is held once.

    Args:
        processor: the model's.
        records: each is asked for once; what `prepare` gave is given back.

    Returns:
        The records.
    """
    if isinstance(records, Prepared):
        return records
    px = side(processor)
    images, light = np.empty((len(records), px, px, 3), np.uint8), []
    for row, record in enumerate(records):
        images[row] = _picture(processor, record.image, px)
        light.append(replace(record, image=images[row]))
    return Prepared(light, images)


def pixel_table(processor: ProcessorMixin) -> np.ndarray:
    """How the processor normalises each channel: what it makes of a value is `value * scale + offset`.

    Args:
        processor: the model's.

    Returns:
        float32 [2, 3]: scale and offset, asked of the processor itself.
    """
    ramp = np.repeat(np.array([0, 255] * 128, np.uint8).reshape(16, 16, 1), 3, axis=-1)
    settings = {"do_center_crop": False} if hasattr(processor.image_processor, "do_center_crop") else {}
    made = processor.image_processor(ramp, do_resize=False, return_tensors="np", **settings)
    low, high = np.asarray(made["pixel_values"], np.float64)[0].reshape(3, 256)[:, :2].T
    return np.stack([(high - low) / 255, low]).astype(np.float32)


def pictures(table: np.ndarray, images: np.ndarray) -> dict[str, np.ndarray]:
    """Squares as a model takes them: one picture a row, normalised on the device.

    Args:
        table: from `pixel_table`.
        images: uint8 [B, px, px, 3] or [B, M, px, px, 3], from `prepare`.

    Returns:
        `pixels` [B, M, px, px, 3], `scale`, `offset` [B, M, 3] and `valid` [B, M].
    """
    pixels = images if images.ndim == 5 else images[:, None]
    scale, offset = (np.broadcast_to(row, (*pixels.shape[:2], 3)) for row in table)
    return {"pixels": pixels, "scale": scale, "offset": offset, "valid": np.ones(pixels.shape[:2], bool)}


def device_batch(table: np.ndarray, arrays: Arrays) -> dict[str, Any]:
    """Rows of `encode` as the model takes them: `images` becomes a tree, everything else stays."""
    batch: dict[str, Any] = dict(arrays)
    if "vision_features" in batch:
        features = batch["vision_features"]
        batch["vision_features"] = features if features.ndim == 4 else features[:, None]
    if "images" in batch:
        return {**batch, "images": pictures(table, batch["images"])}
    return {**batch, "images": {"valid": np.ones(batch["vision_features"].shape[:2], bool)}}


def image_tokens(processor: ProcessorMixin) -> int:
    """How many text positions a picture takes."""
    if isinstance(processor, Blip2Processor):
        return int(processor.num_query_tokens or 0)
    llava = _llava(processor)
    count = (side(processor) // int(llava.patch_size or 1)) ** 2 + llava.num_additional_image_tokens
    return count - (llava.vision_feature_select_strategy == "default")


def check_fit(processor: ProcessorMixin, config: LMMConfig) -> None:
    """Refuses a processor that makes other pictures or tokens than a model reads.

    Args:
        processor: of a checkpoint.
        config: its model.

    Raises:
        AntgmmError: a field that older releases of transformers left out; they differ in the picture's side, in how
            many tokens stand for it or in which token; more tokens than the model has; none that pads.
    """
    picture, counted = placeholder(processor), ("patch_size", "vision_feature_select_strategy")
    if isinstance(processor, Blip2Processor):
        counted = ("num_query_tokens",)
    if absent := [name for name in counted if getattr(processor, name) is None]:
        raise AntgmmError(
            f"the processor has no {absent[0]}, as those that older releases of transformers saved: set it in"
            " processor_config.json to the model's"
        )
    words, vocab = processor.tokenizer, config.language.vocab
    if words.pad_token_id is None:
        raise AntgmmError("the tokenizer has no token that pads: set pad_token in tokenizer_config.json to one it has")
    token = words.convert_tokens_to_ids(picture)
    if token != config.image_token:
        raise AntgmmError(
            f"the processor writes token {token} where the picture stands, the model looks for {config.image_token}:"
            " save the model's own processor beside it, or mend image_token_index in config.json"
        )
    if len(words) > vocab:
        raise AntgmmError(f"the tokenizer has {len(words)} tokens, the model {vocab}: save its own tokenizer beside it")
    px, tokens = side(processor), image_tokens(processor)
    if (px, tokens) != (config.vision.image, config.image_tokens):
        raise AntgmmError(
            f"the processor makes pictures of {px} pixels that take {tokens} tokens, the model reads"
            f" {config.vision.image} and {config.image_tokens}: save the model's own processor beside it"
        )


def placeholder(processor: ProcessorMixin) -> str:
    """What stands for a part of the picture in a prompt."""
    return processor.image_token.content if isinstance(processor, Blip2Processor) else _llava(processor).image_token


def _llava(processor: ProcessorMixin) -> LlavaProcessor:
    if not isinstance(processor, LlavaProcessor):
        raise AntgmmError(f"a {type(processor).__name__} is not supported: use a Blip2Processor or a LlavaProcessor")
    return processor
