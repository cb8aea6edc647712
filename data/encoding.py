"""Encoding of records: prompt and answers as token ids, images as the family's tree."""

import hashlib
import json
import re
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import ProcessorMixin

from antgmm_jax.config import LMMConfig
from antgmm_jax.errors import AntgmmError
from antgmm_jax.extras import versions_of
from antgmm_jax.families import inputs
from antgmm_jax.families.common.words import LongText, Messages
from antgmm_jax.io.files import one_line
from data.chat import ChatEncoder, messages
from data.limits import BadRow, quoted, short
from data.record import PROMPT, Arrays, Record, turns_of
from data.rows import Row

_OF_PROCESSORS = (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RuntimeError, MemoryError)
"""What processors raise for a row that they cannot read."""
_FORMAT = 12
"""Format version of encoded rows; increase it to invalidate caches."""

_IDLE = {"is_local", "local_files_only", "model_specific_special_tokens", "model_max_length", "tokenizer_class"}
"""Settings of a tokenizer that differ between a new one and its saved files, so that both share a cache."""


def versions() -> dict[str, str]:
    """Returns the versions of what reads text and resizes pictures: another one may encode the same row otherwise."""
    return versions_of("transformers", "tokenizers", "torchvision", "pillow")


class TooLong(NamedTuple):
    """A part of a row with too many tokens: part, number of tokens, limit, and name of the setting with the limit.

    The name is "" for a limit of the model.
    """

    part: str
    tokens: int
    limit: int
    name: str


class LongRow(BadRow):
    """A row that the model cannot read because of `part`, which is too long for it."""

    def __init__(self, reason: str, part: TooLong):
        super().__init__(reason)
        self.part = part


class Encoder:
    """Encodes records with the processor of a checkpoint.

    Args:
        processor: processor of the model.
        config: model config.
        max_length: maximum number of prompt tokens, not counting image tokens.
        max_answer: maximum number of answer tokens, including the end token.
        template: prompt template of single questions, see `data.record.prompt`.

    Attributes:
        inputs: the family's `Inputs`.
        eos: token that ends an answer: what the chat template writes, else the end token of the tokenizer.
        opening: words that the chat template writes before an answer; they are trained on, but not part of it.
        pad: padding token.
        settings: prompt template and limits.

    Raises:
        AntgmmError: the processor does not fit the model, or the template contains the image token.
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
        with one_line(lambda: "the processor does not fit the model", "save the model's processor there"):
            self.inputs = inputs(config, processor)
        self._words, self._template = processor.tokenizer, template
        self._max_length, self._max_answer = max_length, max_answer
        self.settings = {"prompt": template, "max_length": max_length, "max_answer": max_answer}
        self._about = f"{_FORMAT} {config.family} {config.image_token} {config.vision.image} {config.image_tokens}"
        self._about += f" {config.language.learned_positions}" if config.language.learned_positions else ""
        self._chat = ChatEncoder(self.inputs, config)
        self.eos, self.pad, self.opening = self._chat.end, self._words.pad_token_id, self._chat.opening
        self._vocab, self._positions = config.language.vocab, config.language.learned_positions
        self._token, picture = config.image_token, self._words.convert_ids_to_tokens(config.image_token)
        self._special = special_tokens(self._words, config.image_token)
        if picture in template:
            raise AntgmmError(
                f"prompt = {template!r} contains {picture}: remove it, the processor places the image tokens"
            )

    def __call__(self, record: Record) -> Arrays:
        """Encodes a record.

        Args:
            record: record with images.

        Returns:
            `prompt` int32 [T] including image tokens, `answer` int32 [A] with end token, `images` {leaf: [M, ...]}, a
            copy of their leaf `place` if they have it, `latents` {name: int32 []}, `cells` if the record has them, and
            of a conversation of several turns `earlier` int32 [E], places in the prompt of the earlier answers' tokens.

        Raises:
            BadRow: the model cannot read the record; `LongRow` if a part is too long for the model itself.
            AntgmmError: the model cannot be trained on conversations of several turns.
        """
        turns = turns_of(record, self._template)
        try:
            self._chat.check(turns)
        except AntgmmError as error:
            raise AntgmmError(f"{short(record.id)}: {error}") from error
        try:
            row = self._chat(turns, record.answer, record.images)
        except LongText as error:
            raise LongRow(str(error), TooLong(error.part, error.tokens, error.limit, "")) from error
        except AntgmmError as error:
            raise BadRow(str(error)) from error
        except _OF_PROCESSORS as error:
            raise BadRow(" ".join(str(error).split()) or type(error).__name__) from error
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # of the Rust library tokenizers; it is no Exception
                raise
            raise AntgmmError(
                f"{record.id}: the tokenizer fails ({error}): correct the patterns in its tokenizer.json"
            ) from error
        if max(row["prompt"].max(initial=0), row["answer"].max(initial=0)) >= self._vocab:
            raise BadRow("has a token that the model's vocabulary lacks: save the model's own tokenizer in its folder")
        self._check_answers(row, record)
        images = row["images"]
        more = {} if record.cells is None else {"cells": record.cells}
        # The positions of the tokens depend on it, also if cached features replace the images.
        more |= {"place": images["place"]} if "place" in images else {}
        return {**row, "latents": {name: np.int32(value) for name, value in record.latents.items()}, **more}

    def _check_answers(self, row: Arrays, record: Record) -> None:
        """Raises BadRow if the last answer contains the token that ends it, or a part of an answer becomes unknown.

        The unknown token is left out when answers are decoded.
        """
        if self.eos in row["answer"][:-1]:
            raise BadRow(
                f"the answer {quoted(record.answer)} contains {self._words.decode([self.eos])!r}, with which the model"
                " ends answers: write it without"
            )
        unknown = self._words.unk_token_id
        if unknown is None or unknown in (self.eos, self.pad):
            return
        earlier = row["prompt"][row["earlier"]] if "earlier" in row else ()
        if unknown in row["answer"] or unknown in earlier:
            raise BadRow(
                f"the model's tokenizer has no tokens for all of the answer {quoted(record.answer)}: write it in"
                " characters that it knows, or remove the row"
            )

    def images(self, record: Record) -> Arrays:
        """Returns the images of a valid record, {leaf: [M, ...]}, without the work of `__call__` on its answers."""
        return self.inputs(self.inputs.chat(self.messages(record)), record.images)[1]

    def messages(self, record: Record) -> Messages:
        """Returns the conversation of a record, up to the answer."""
        return messages(turns_of(record, self._template))

    def too_long(self, row: Arrays) -> list[TooLong]:
        """Returns the parts of an encoded row that have too many tokens; of several answers, the longest one counts."""
        earlier = row.get("earlier", np.zeros(0, int))
        answers = [len(row["answer"]), *map(len, np.split(earlier, np.flatnonzero(np.diff(earlier) > 1) + 1))]
        prompt = TooLong("prompt", int((row["prompt"] != self._token).sum()), self._max_length, "max_length")
        answer = TooLong("answer", max(answers), self._max_answer, "max_answer")
        parts = [part for part in (prompt, answer) if part.tokens > part.limit]
        whole = len(row["prompt"]) + len(row["answer"])
        if self._positions and whole > self._positions:  # image tokens have positions too
            parts.append(TooLong("prompt with images and answer", whole, self._positions, ""))
        return parts

    def special_parts(self, record: Record | Row) -> list[tuple[str, str]]:
        """Returns the parts of a record that contain a special token of the tokenizer, with the first such token.

        The image token would be replaced by image states, an end token would end the turn of the user.
        """
        parts = {name: getattr(record, name) for name in ("question", "text", "answer")}
        if record.turns:
            parts = {f"turn {n} ({turn.role})": turn.text for n, turn in enumerate(record.turns, 1)}
            parts["answer"] = record.answer
        matches = {name: self._special.search(text) for name, text in parts.items()}
        return [(name, match[0]) for name, match in matches.items() if match]

    def check_text(self, texts: bool) -> None:
        """Raises AntgmmError if rows have a text (`texts`) but the template does not contain it."""
        if texts and "{text}" not in self._template:
            raise AntgmmError(
                f"prompt = {self._template!r} does not contain the text of rows: add [{{text}} ], or remove the text"
                " from the rows"
            )

    def digest(self) -> str:
        """Returns a digest of everything but the record that an encoded row depends on."""
        inputs = f"{self._about} {self._template!r} {self._max_length} {self._max_answer}"
        digest = hashlib.sha256(inputs.encode())
        with tempfile.TemporaryDirectory() as folder:
            self.inputs.processor.save_pretrained(folder)
            for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
                digest.update(path.name.encode() + _content(path))
        return digest.hexdigest()


def _content(path: Path) -> bytes:
    """Content of a file of a processor, without settings of the tokenizer that change no row."""
    if path.name != "tokenizer_config.json":
        return path.read_bytes()
    settings = json.loads(path.read_text(encoding="utf-8"))
    return json.dumps({name: value for name, value in settings.items() if name not in _IDLE}, sort_keys=True).encode()


def special_tokens(tokenizer: Any, image_token: int) -> re.Pattern[str]:
    """Returns a pattern of the image token and all special tokens, which texts of rows and requests must not contain.

    An end token that is an ordinary token, such as a line break, may stand in them.

    Args:
        tokenizer: the tokenizer.
        image_token: id of the image token.
    """
    picture = tokenizer.convert_ids_to_tokens(image_token)
    known = tokenizer.added_tokens_decoder.values()
    added = {token.content for token in known if token.special}
    ordinary = {"", tokenizer.eos_token} - {token.content for token in known}
    # Longer ones first, as one may begin with another.
    tokens = sorted({picture, *tokenizer.all_special_tokens, *added} - ordinary, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, tokens)) or "(?!)")


def refuse(special: Sequence[tuple[str, tuple[str, str]]], long: Sequence[tuple[str, TooLong]], count: int) -> None:
    """Raises one error that lists all invalid rows.

    Args:
        special: (row, (part, token)) pairs that contain a special token.
        long: (row, part) pairs with too many tokens.
        count: total number of rows.

    Raises:
        AntgmmError: there is an invalid row.
    """
    if special:
        lines = (f"{row}: {part} contains {token}" for row, (part, token) in special)
        raise AntgmmError("rows contain special tokens of the tokenizer; remove them", *lines)
    if long:
        rows, names = len({row for row, _ in long}), _joined(part.name for _, part in long if part.name)
        more = f', or raise {names}, or leave them out (too_long = "drop" in the table of the data)'
        remedy = f"shorten or remove them{more if names else ''}"
        head = f"{rows} of {count} rows are too long; {remedy}"
        lines = (f"{row}: {part.part} of {part.tokens} tokens, at most {part.limit}" for row, part in long)
        raise AntgmmError(head, *lines)


def _joined(names: Iterable[str]) -> str:
    return " and ".join(dict.fromkeys(names))


def decode(processor: ProcessorMixin, tokens: np.ndarray, opening: str = "") -> list[str]:
    """Decodes generated token ids, without special tokens.

    Args:
        processor: processor of the model.
        tokens: int32 [N, T].
        opening: words before each answer that are left out, `Encoder.opening`.

    Returns:
        One answer per row.
    """
    lines = processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return [line.strip().removeprefix(opening).strip() for line in lines]
