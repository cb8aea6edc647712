"""Records as the arrays that a model is trained on and asked by: words as their processor's own token ids."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from transformers import Blip2Processor, ProcessorMixin

from antgmm_jax.errors import AntgmmError
from data.processor import image_tokens, placeholder, prepare
from data.record import PROMPT, Arrays, Record, prompt

IGNORE = -100


def prompts(processor: ProcessorMixin, records: Sequence[Record], template: str = PROMPT) -> list[str]:
    """The text given to the processor for each record, beside its picture."""
    lines = [prompt(record.question, record.text, template) for record in records]
    if isinstance(processor, Blip2Processor):
        return lines
    if not processor.chat_template:
        return [f"USER: {placeholder(processor)}\n{line} ASSISTANT:" for line in lines]
    parts = ([{"type": "image"}, {"type": "text", "text": line}] for line in lines)
    turns = [[{"role": "user", "content": part}] for part in parts]
    return [processor.apply_chat_template(turn, add_generation_prompt=True) for turn in turns]


def _prompt_ids(processor: ProcessorMixin, records: Sequence[Record], template: str) -> list[list[int]]:
    """Token ids of the prompts with the picture's placeholders, as the processor itself makes them."""
    _check_words(processor, records, template)
    lines, count, picture = prompts(processor, records, template), image_tokens(processor), placeholder(processor)
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
    name = placeholder(processor)
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
