"""Records as what a model reads: prompt and answer as token ids, pictures as the family's tree."""

import hashlib
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from transformers import ProcessorMixin

from antgmm_jax.config import LMMConfig
from antgmm_jax.errors import AntgmmError
from antgmm_jax.families import inputs
from data.record import PROMPT, Arrays, Record, prompt
from data.rows import Row

_FORMAT = 1
"""Of encoded rows; another one makes those of earlier code worthless."""


class Long(NamedTuple):
    """A part of a row that has too many tokens: which part, how many, how many it may have, and what says so."""

    part: str
    tokens: int
    limit: int
    name: str


class Encoder:
    """Encodes records as a checkpoint's own processor does.

    Args:
        processor: the model's.
        config: the model.
        max_length: most tokens of a prompt beside the pictures'.
        max_answer: most tokens of an answer, end token included.
        template: of the prompts, as `data.record.prompt` takes it.

    Attributes:
        inputs: the family's.
        eos: the token that ends an answer.
        pad: the token that fills rows.

    Raises:
        AntgmmError: a processor that does not fit the model, or a template that names the pictures.
    """

    def __init__(
        self,
        processor: ProcessorMixin,
        config: LMMConfig,
        *,
        max_length: int = 512,
        max_answer: int = 64,
        template: str = PROMPT,
    ):
        self.inputs = inputs(config, processor)
        self._words, self._template = processor.tokenizer, template
        self._max_length, self._max_answer = max_length, max_answer
        self._about = f"{_FORMAT} {config.family} {config.image_token} {config.vision.image} {config.image_tokens}"
        self.eos, self.pad = self._words.eos_token_id, self._words.pad_token_id
        self._token, self.picture = config.image_token, self._words.convert_ids_to_tokens(config.image_token)
        if self.picture in template:
            raise AntgmmError(
                f"prompt = {template!r} names {self.picture}: where the picture stands is the processor's to say"
            )

    def __call__(self, record: Record) -> Arrays:
        """A record, encoded.

        Args:
            record: with its pictures.

        Returns:
            `prompt` int32 [T], placeholders of the pictures among it, `answer` int32 [A] with its end token, `images`
            {leaf: [M, ...]}, `latents` {name: int32 []}, and `cells` where the record has them.
        """
        line = prompt(record.question, record.text, self._template)
        ids, images = self.inputs(line, record.images)
        answer = [*self._words(record.answer, add_special_tokens=False)["input_ids"], self.eos]
        latents = {name: np.int32(value) for name, value in record.latents.items()}
        cells = {} if record.cells is None else {"cells": record.cells}
        return {"prompt": ids, "answer": np.array(answer, np.int32), "images": images, "latents": latents, **cells}

    def too_long(self, row: Arrays) -> list[Long]:
        """The parts of an encoded row that have too many tokens."""
        prompt = Long("prompt", int((row["prompt"] != self._token).sum()), self._max_length, "max_length")
        answer = Long("answer", len(row["answer"]), self._max_answer, "max_answer")
        return [part for part in (prompt, answer) if part.tokens > part.limit]

    def names_pictures(self, record: Record | Row) -> list[str]:
        """The parts of a record that hold the pictures' placeholder: parts of pictures would stand there."""
        return [part for part in ("question", "text", "answer") if self.picture in getattr(record, part)]

    def check_text(self, texts: bool) -> None:
        """Refuses a template that leaves out the text of rows. `texts`: whether a row has any."""
        if texts and "{text}" not in self._template:
            raise AntgmmError(
                f"prompt = {self._template!r} leaves out the text of rows: write [{{text}} ] into it, or take it out of"
                " them"
            )

    def digest(self) -> str:
        """A digest of all that an encoded row depends on beside its record: processor, model, template and limits."""
        about = f"{self._about} {self._template!r} {self._max_length} {self._max_answer}"
        digest = hashlib.sha256(about.encode())
        with tempfile.TemporaryDirectory() as folder:
            self.inputs.processor.save_pretrained(folder)
            for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
                digest.update(path.name.encode() + path.read_bytes())
        return digest.hexdigest()


def refuse(named: Sequence[tuple[str, str]], long: Sequence[tuple[str, Long]], count: int, picture: str) -> None:
    """Refuses rows together, each with its reason.

    Args:
        named: row and part that hold the pictures' placeholder.
        long: row and part that have too many tokens.
        count: rows in all.
        picture: the placeholder.

    Raises:
        AntgmmError: there is such a row.
    """
    if named:
        lines = (f"{row}: {part}" for row, part in named)
        raise AntgmmError("\n".join([f"{picture} stands for the picture; take it out of what rows say", *lines]))
    if long:
        rows, names = len({row for row, _ in long}), _joined(part.name for _, part in long)
        head = f"{rows} of {count} rows are too long; shorten or remove them, or raise {names}"
        lines = (f"{row}: {part.part} of {part.tokens} tokens, at most {part.limit}" for row, part in long)
        raise AntgmmError("\n".join([head, *lines]))


def _joined(names: Iterable[str]) -> str:
    return " and ".join(dict.fromkeys(names))


def decode(processor: ProcessorMixin, tokens: np.ndarray) -> list[str]:
    """Generated token ids as answers, without special tokens.

    Args:
        processor: the model's.
        tokens: int32 [N, T].

    Returns:
        One answer a row.
    """
    return [line.strip() for line in processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)]
