"""Hugging Face processors, and their exact output without their cost: uint8 images once, a table lookup a batch."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer
from transformers import Blip2Processor, BlipImageProcessor, CLIPImageProcessor, LlavaProcessor, ProcessorMixin

from antgmm_jax.config import LMMConfig
from antgmm_jax.errors import AntgmmError
from data.record import PROMPT, Arrays, Record, prompt
from data.tokenizer import wrap

IGNORE = -100
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
    """What the processor makes of each of the 256 values of each channel, asked of the processor itself.

    Args:
        processor: the model's.

    Returns:
        float32 [3, 256].
    """
    ramp = np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, axis=-1)
    settings = {"do_center_crop": False} if hasattr(processor.image_processor, "do_center_crop") else {}
    made = processor.image_processor(ramp, do_resize=False, return_tensors="np", **settings)
    return np.asarray(made["pixel_values"], np.float32)[0].reshape(3, 256)


def pixel_values(table: np.ndarray, images: np.ndarray) -> np.ndarray:
    """Normalised pictures, bit for bit the processor's.

    Args:
        table: from `pixel_table`.
        images: uint8 [N, px, px, 3], from `prepare`.

    Returns:
        float32 [N, 3, px, px].
    """
    # On the host: what JAX computes waits for the step that the device is at, and so would whoever makes batches ahead.
    # A channel of one picture at a time: numpy's indices, eight bytes a pixel, then stay in the processor's cache.
    found = np.empty((len(images), 3, *images.shape[1:3]), np.float32)
    for picture, image in zip(found, images, strict=True):
        for channel in range(3):
            np.take(table[channel], image[..., channel], out=picture[channel], mode="clip")
    return found


def device_batch(table: np.ndarray, arrays: Arrays) -> Arrays:
    """Rows of `encode` as the model takes them: `images`, if any, becomes `pixel_values`, everything else stays."""
    if "images" not in arrays:
        return arrays
    rest = {name: value for name, value in arrays.items() if name != "images"}
    return {"pixel_values": pixel_values(table, arrays["images"]), **rest}


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
    picture, counted = _placeholder(processor), ("patch_size", "vision_feature_select_strategy")
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


def _placeholder(processor: ProcessorMixin) -> str:
    """What stands for a part of the picture in a prompt."""
    return processor.image_token.content if isinstance(processor, Blip2Processor) else _llava(processor).image_token


def _llava(processor: ProcessorMixin) -> LlavaProcessor:
    if not isinstance(processor, LlavaProcessor):
        raise AntgmmError(f"a {type(processor).__name__} is not supported: use a Blip2Processor or a LlavaProcessor")
    return processor


def prompts(processor: ProcessorMixin, records: Sequence[Record], template: str = PROMPT) -> list[str]:
    """The text given to the processor for each record, beside its picture."""
    lines = [prompt(record.question, record.text, template) for record in records]
    if isinstance(processor, Blip2Processor):
        return lines
    if not processor.chat_template:
        return [f"USER: {_llava(processor).image_token}\n{line} ASSISTANT:" for line in lines]
    parts = ([{"type": "image"}, {"type": "text", "text": line}] for line in lines)
    turns = [[{"role": "user", "content": part}] for part in parts]
    return [processor.apply_chat_template(turn, add_generation_prompt=True) for turn in turns]


def _prompt_ids(processor: ProcessorMixin, records: Sequence[Record], template: str) -> list[list[int]]:
    """Token ids of the prompts with the picture's placeholders, as the processor itself makes them."""
    _check_words(processor, records, template)
    lines, count, picture = prompts(processor, records, template), image_tokens(processor), _placeholder(processor)
    if isinstance(processor, Blip2Processor):
        token = processor.tokenizer.convert_tokens_to_ids(picture)
        return [[token] * count + ids for ids in processor.tokenizer(lines)["input_ids"]]
    lines = [line.replace(picture, picture * count) for line in lines]
    # A chat template writes the start token itself where the tokenizer would add a second one.
    bos = processor.tokenizer.bos_token
    add = not (bos and lines and lines[0].startswith(bos))
    return processor.tokenizer(lines, add_special_tokens=add)["input_ids"]


def _padded(rows: Sequence[Sequence[int]], length: int, fill: int, *, left: bool = False) -> np.ndarray:
    out = np.full((len(rows), length), fill, np.int32)
    for place, row in enumerate(rows):
        if row:
            out[place, length - len(row) if left else 0 : length if left else len(row)] = row
    return out


def _mask(rows: Sequence[Sequence[int]], length: int, *, left: bool = False) -> np.ndarray:
    return _padded([[1] * len(row) for row in rows], length, 0, left=left)


def bucket(length: int, multiple: int = 8) -> int:
    """The smallest multiple that holds a length: few shapes mean few compilations."""
    return -(-length // multiple) * multiple


class _Limited(NamedTuple):
    """Lengths of one part of the records, and what bounds them."""

    part: str
    lengths: Sequence[int]
    limit: int
    name: str


def _check(records: Sequence[Record], *parts: _Limited) -> None:
    """Refuses the rows that are too long together, each with its reason."""
    over = [(row, part) for row in range(len(records)) for part in parts if part.lengths[row] > part.limit]
    if over:
        count = f"{len({row for row, _ in over})} of {len(records)} rows are too long"
        names = " and ".join(dict.fromkeys(part.name for _, part in over))
        reasons = (
            f"{records[row].id or f'record {row + 1}'}: {part.part} of {part.lengths[row]} tokens, at most {part.limit}"
            for row, part in over
        )
        raise AntgmmError("\n".join([f"{count}; shorten or remove them, or raise {names}", *reasons]))


def _check_words(processor: ProcessorMixin, records: Sequence[Record], template: str) -> None:
    """Refuses words that hold the picture's placeholder, for parts of it would stand there, and texts left unsaid."""
    name = _placeholder(processor)
    if name in template:
        raise AntgmmError(f"prompt = {template!r} names {name}: where the picture stands is the processor's to say")
    if "{text}" not in template and any(record.text for record in records):
        raise AntgmmError(
            f"prompt = {template!r} leaves out the text of rows: write [{{text}} ] into it, or take it out of them"
        )
    over = [
        f"{record.id or f'record {row}'}: {part}"
        for row, record in enumerate(records, 1)
        for part in ("question", "text", "answer")
        if name in getattr(record, part)
    ]
    if over:
        raise AntgmmError("\n".join([f"{name} stands for the picture; take it out of what rows say", *over]))


def _limited_prompts(processor: ProcessorMixin, ids: Sequence[Sequence[int]], max_length: int) -> _Limited:
    count = image_tokens(processor)
    return _Limited("prompt", [len(row) - count for row in ids], max_length, "max_length")


def encode_prompts(
    processor: ProcessorMixin,
    records: Sequence[Record],
    *,
    max_length: int = 512,
    width: int = 0,
    template: str = PROMPT,
) -> Arrays:
    """Prompts for generation, padded to a multiple of 8 (on the left where the decoder goes on from the prompt).

    Args:
        processor: a `Blip2Processor` (with T5) or a `LlavaProcessor`.
        records: at least one.
        max_length: greatest number of tokens of a prompt beside the picture's.
        width: least number of columns, of prompts that are to share a program with longer ones.
        template: of the prompts, as `data.record.prompt` takes it.

    Returns:
        `images` uint8 [N, px, px, 3], `input_ids`, `attention_mask` int32 [N, L].

    Raises:
        AntgmmError: a prompt is too long; every such row is named, each on a line of its own.
    """
    records = prepare(processor, records)
    ids = _prompt_ids(processor, records, template)
    _check(records, _limited_prompts(processor, ids, max_length))
    left = not isinstance(processor, Blip2Processor)
    length = bucket(max(width, *map(len, ids)))
    return {
        "images": records.images,
        "input_ids": _padded(ids, length, processor.tokenizer.pad_token_id, left=left),
        "attention_mask": _mask(ids, length, left=left),
    }


def encode(
    processor: ProcessorMixin,
    records: Sequence[Record],
    *,
    max_length: int = 512,
    max_answer: int = 64,
    start_token: int = 0,
    template: str = PROMPT,
) -> Arrays:
    """Records as training arrays, padded on the right to multiples of 8; an answer ends with the end token.

    The loss reads `positions` (where along the logits the state that predicts an answer token stands) and `targets`
    (that token, -100 for none).

    Args:
        processor: a `Blip2Processor` (with T5) or a `LlavaProcessor`.
        records: at least one; a source that draws records on the fly is read once.
        max_length: greatest number of tokens of a prompt beside the picture's.
        max_answer: greatest number of tokens of an answer, end token included.
        start_token: first token that T5's decoder reads.
        template: of the prompts, as `data.record.prompt` takes it.

    Returns:
        `images` uint8 [N, px, px, 3] and int32 arrays: `input_ids`, `attention_mask` [N, L], `labels`, `positions`,
        `targets` [N, A]; with T5 also `decoder_input_ids` [N, A]. LLaVA's `labels` are [N, L].

    Raises:
        AntgmmError: prompts or answers are too long; every such row is named, each on a line of its own.
    """
    records = prepare(processor, records)
    ids = _prompt_ids(processor, records, template)
    eos, pad = processor.tokenizer.eos_token_id, processor.tokenizer.pad_token_id
    answers = processor.tokenizer([record.answer for record in records], add_special_tokens=False)["input_ids"]
    answers = [[*row, eos] for row in answers]
    tails = _Limited("answer", [len(row) for row in answers], max_answer, "max_answer")
    _check(records, _limited_prompts(processor, ids, max_length), tails)
    width = bucket(max(map(len, answers)))
    arrays = {"images": records.images, "targets": _padded(answers, width, IGNORE)}
    if isinstance(processor, Blip2Processor):
        length = bucket(max(map(len, ids)))
        return arrays | {
            "input_ids": _padded(ids, length, pad),
            "attention_mask": _mask(ids, length),
            "decoder_input_ids": _padded([[start_token, *row[:-1]] for row in answers], width, pad),
            "labels": arrays["targets"].copy(),
            "positions": np.tile(np.arange(width, dtype=np.int32), (len(records), 1)),
        }
    joined = [a + b for a, b in zip(ids, answers, strict=True)]
    length = bucket(max(map(len, joined)))
    pairs = list(zip(ids, answers, strict=True))
    return arrays | {
        "input_ids": _padded(joined, length, pad),
        "attention_mask": _mask(joined, length),
        "labels": _padded([[IGNORE] * len(a) + b for a, b in pairs], length, IGNORE),
        "positions": _padded([range(len(a) - 1, len(a) + len(b) - 1) for a, b in pairs], width, 0),
    }


def decode(processor: ProcessorMixin, tokens: np.ndarray) -> list[str]:
    """Generated token ids as answers, without special tokens.

    Args:
        processor: the model's.
        tokens: int32 [N, T].

    Returns:
        One answer a row.
    """
    return [line.strip() for line in processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)]
