"""The record: the common format of all data sets, turns of conversations, and the prompt template."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from string import Formatter
from typing import Any, NamedTuple

import numpy as np

Arrays = dict[str, Any]
"""A tree of NumPy arrays: an encoded record, or a batch with a leading axis of records."""
PROMPT = "[text: {text} ]question: {question}"
"""The default prompt template."""
ROLES = ("system", "user", "assistant")
"""Roles of the turns of a conversation."""
_OPTIONAL = re.compile(r"\[([^\[\]]*\{text\}[^\[\]]*)\]")


class Turn(NamedTuple):
    """A turn of a conversation.

    Attributes:
        role: one of `ROLES`.
        parts: texts, and None in the place of each image.
    """

    role: str
    parts: tuple[str | None, ...]

    @property
    def text(self) -> str:
        """The text of the turn."""
        return "".join(part for part in self.parts if part is not None)


@dataclass(frozen=True, kw_only=True)
class Record:
    """A question with its answer, about any number of images, or a conversation that ends with an answer.

    Attributes:
        images: uint8 [H, W, 3] each.
        question: the question; of a conversation, the text of its last user turn.
        answer: the expected answer; of a conversation, its last one.
        turns: the turns of a conversation before the last answer; empty for a single question, which a prompt template
            puts into words.
        text: text that accompanies the images of a single question, "" for none.
        type: question type, by which metrics are grouped.
        id: name of the record in messages.
        slice: subset of an evaluation set to which the record belongs.
        latents: integer facts about the image, for pretraining an image encoder.
        cells: class of every cell of a grid over the image, uint8 [side, side], for pretraining an image encoder.
    """

    images: tuple[np.ndarray, ...]
    question: str
    answer: str
    turns: tuple[Turn, ...] = ()
    text: str = ""
    type: str = ""
    id: str = ""
    slice: str = ""
    latents: Mapping[str, int] = field(default_factory=dict)
    cells: np.ndarray | None = None


def images_first(turns: tuple[Turn, ...], count: int) -> tuple[Turn, ...]:
    """Moves the places of images to the beginning of the first user turn.

    Args:
        turns: turns of a conversation.
        count: new number of images.

    Returns:
        The turns.
    """
    plain = [Turn(turn.role, tuple(part for part in turn.parts if part is not None)) for turn in turns]
    first = next(place for place, turn in enumerate(plain) if turn.role == "user")
    plain[first] = Turn("user", (*[None] * count, *plain[first].parts))
    return tuple(plain)


def prompt(question: str, text: str = "", template: str = PROMPT) -> str:
    """Fills in a prompt template.

    Args:
        question: the question.
        text: text that accompanies the images, if any.
        template: see `check_template`.

    Returns:
        The prompt.
    """
    line = _OPTIONAL.sub(r"\1" if text else "", template)
    return line.format(question=question, text=text)


def turns_of(record: Record, template: str = PROMPT) -> tuple[Turn, ...]:
    """Returns the turns of a record before its answer; of a single question, a user turn of its images and the prompt.

    Args:
        record: the record.
        template: see `check_template`.
    """
    line = prompt(record.question, record.text, template)
    return record.turns or (Turn("user", (*[None] * len(record.images), line)),)


def check_template(template: str) -> str:
    """Validates a prompt template.

    Args:
        template: contains `{question}` and optionally `{text}`; a part in square brackets around `{text}` is left out
            if there is no text.

    Returns:
        The template.

    Raises:
        ValueError: the template is invalid.
    """
    try:
        parts = [(name, spec, kind) for _, name, spec, kind in Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise ValueError(f"{template!r} is not a valid template ({error}): write {{{{ and }}}} for braces") from None
    if wrong := [name for name, spec, kind in parts if name not in ("question", "text") or spec or kind]:
        raise ValueError(f"{template!r} contains {{{wrong[0]}}}: only {{question}} and {{text}} are allowed")
    if "question" not in [name for name, _, _ in parts]:
        raise ValueError(f"{template!r} has no question: add {{question}}")
    return template
