"""Requests to a package: shapes of prompts, and how answers end."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

Prompt = Mapping[str, Any]
"""`images`, `input_ids` and `attention_mask` of a batch."""


class Shape(NamedTuple):
    """Shape of the prompts of a compiled program: rows, and tokens of the longest prompt."""

    rows: int
    width: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.width}"


class Limits(NamedTuple):
    """How an answer ends.

    Attributes:
        tokens: most tokens.
        eos: tokens that end it.
        pad: token after the end.
    """

    tokens: int
    eos: tuple[int, ...]
    pad: int

    def text(self) -> dict[str, str]:
        """The limits as metadata of a file."""
        return {"tokens": str(self.tokens), "eos": ",".join(map(str, self.eos)), "pad": str(self.pad)}


def shaped(prompt: Prompt, rows: np.ndarray, shape: Shape, *, left: bool) -> dict[str, Any]:
    """Returns some rows of prompts in a shape.

    Args:
        prompt: prompts of any width.
        rows: numbers of at most `shape.rows` rows; they are repeated to fill the shape.
        shape: the shape, wide enough for these rows.
        left: whether padding stands before the tokens.
    """
    return fitted(taken(prompt, np.resize(rows, shape.rows)), shape.width, left=left)


def fitted(prompt: Prompt, width: int, *, left: bool) -> dict[str, Any]:
    """Returns prompts padded to a width.

    Args:
        prompt: prompts of any width that hold at most `width` tokens each.
        width: tokens per row.
        left: whether padding stands before the tokens.
    """
    text = {}
    for name in ("input_ids", "attention_mask"):
        rows = prompt[name]
        more = max(0, width - rows.shape[1])
        rows = np.pad(rows, ((0, 0), (more, 0) if left else (0, more)))
        text[name] = rows[:, -width:] if left else rows[:, :width]
    return {**prompt, **text}


def taken(prompt: Prompt, rows: np.ndarray) -> dict[str, Any]:
    """Returns some rows of prompts."""
    return jax.tree.map(lambda leaf: leaf[rows], dict(prompt))
