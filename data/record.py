"""The one form in which every data set reaches the model."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

Arrays = dict[str, np.ndarray]
"""Encoded records by name of what is encoded, one row a record."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """One question about one picture.

    `image` is uint8 [H, W, 3]; `text` accompanies the picture; `type` groups questions in the metrics and `slice`
    names what is unusual about the record. For pretraining an encoder, `latents` are integer facts of the picture and
    `cells` the class of what each cell of a grid laid over it shows, uint8 [side, side].
    """

    image: np.ndarray
    question: str
    answer: str
    text: str = ""
    type: str = ""
    id: str = ""
    slice: str = ""
    latents: Mapping[str, int] = field(default_factory=dict)
    cells: np.ndarray | None = None


def prompt(question: str, text: str = "") -> str:
    """What the model is asked, the same in training, evaluation and the exported model's documentation.

    Args:
        question: the question.
        text: text that accompanies the picture, if any.

    Returns:
        One line.
    """
    return f"text: {text} question: {question}" if text else f"question: {question}"
