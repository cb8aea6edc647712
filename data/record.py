"""The one form in which every data set reaches the model."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from string import Formatter
from typing import Any

import numpy as np

Arrays = dict[str, Any]
"""A tree of numpy arrays by name: an encoded record, or a batch of them with the records first in every leaf."""
PROMPT = "[text: {text} ]question: {question}"
"""How a model is asked unless a recipe says otherwise."""
_OPTIONAL = re.compile(r"\[([^\[\]]*\{text\}[^\[\]]*)\]")


@dataclass(frozen=True, kw_only=True)
class Record:
    """One question about a picture, about several or about none.

    Each of `images` is uint8 [H, W, 3]; `text` accompanies them; `type` groups questions in the metrics and `slice`
    names what is unusual about the record. For pretraining an encoder, `latents` are integer facts of the picture and
    `cells` the class of what each cell of a grid laid over it shows, uint8 [side, side].
    """

    images: tuple[np.ndarray, ...]
    question: str
    answer: str
    text: str = ""
    type: str = ""
    id: str = ""
    slice: str = ""
    latents: Mapping[str, int] = field(default_factory=dict)
    cells: np.ndarray | None = None


def prompt(question: str, text: str = "", template: str = PROMPT) -> str:
    """What the model is asked, the same in training, evaluation and the exported model's documentation.

    Args:
        question: the question.
        text: text that accompanies the picture, if any.
        template: `check_template` tells its form.

    Returns:
        The template with both filled in.
    """
    line = _OPTIONAL.sub(r"\1" if text else "", template)
    return line.format(question=question, text=text)


def check_template(template: str) -> str:
    """Refuses a template that `prompt` cannot fill.

    Args:
        template: `{question}` stands for the question, `{text}` for the text; square brackets around `{text}`
            hold what is left out where there is no text.

    Returns:
        The template.

    Raises:
        ValueError: what it names or lacks.
    """
    try:
        parts = [(name, spec, kind) for _, name, spec, kind in Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise ValueError(f"{template!r} is no template ({error}): write {{{{ and }}}} for braces") from None
    if wrong := [name for name, spec, kind in parts if name not in ("question", "text") or spec or kind]:
        raise ValueError(f"{template!r} names {{{wrong[0]}}}: only {{question}} and {{text}} are filled in")
    if "question" not in [name for name, _, _ in parts]:
        raise ValueError(f"{template!r} asks no question: write {{question}} where it stands")
    return template
