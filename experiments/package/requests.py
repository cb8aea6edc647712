"""Requests to a package: shapes of prompts, and the loop over the tokens of answers."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import torch
from torch import Tensor
from torch._inductor.package.package import load_package

from experiments.package.programs import generating

Prompt = Mapping[str, Any]
"""`images`, `input_ids` and `attention_mask` of a batch."""


class Shape(NamedTuple):
    """Shape of the prompts of a compiled program: rows, and tokens of the longest prompt."""

    rows: int
    width: int

    def program(self, part: str) -> str:
        """Name of a program in the file; `part` is "start" or "next"."""
        return f"{part}_{self.rows}x{self.width}"


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


class Answerer(NamedTuple):
    """The two programs of a shape.

    Attributes:
        start: inputs -> first token and state.
        step: token, number, state -> next token and state.
        limits: how answers end, from the file.
    """

    start: Callable[..., Any]
    step: Callable[..., Any]
    limits: Limits

    @classmethod
    def load(cls, file: Path, shape: Shape) -> "Answerer":
        """Loads the programs of a shape from a package."""
        start, step = (load_package(str(file), shape.program(part)) for part in ("start", "next"))
        about = start.get_metadata()
        eos = tuple(int(token) for token in about["eos"].split(","))
        return cls(start, step, Limits(int(about["tokens"]), eos, int(about["pad"])))

    def __call__(self, inputs: Mapping[str, Tensor]) -> np.ndarray:
        """Greedy answers, int [B, N], padded after their end."""
        tokens, eos, pad = self.limits
        token, state = self.start(dict(inputs))
        answer, ended = [token], torch.isin(token, torch.tensor(eos))
        while len(answer) < tokens and not ended.all():
            token, state = self.step(token, torch.tensor(len(answer)), state)
            token = torch.where(ended, pad, token)
            answer.append(token)
            ended |= torch.isin(token, torch.tensor(eos))
        return np.pad(torch.stack(answer, 1).numpy(), ((0, 0), (0, tokens - len(answer))), constant_values=pad)


def shaped(model: Any, prompt: Prompt, rows: np.ndarray, shape: Shape) -> dict[str, Any]:
    """Returns some rows of prompts in a shape, padded on the side where the model was trained with padding.

    Args:
        model: from `in_torch.torch_model`.
        prompt: prompts of any width.
        rows: numbers of at most `shape.rows` rows; they are repeated to fill the shape.
        shape: the shape, wide enough for these rows.
    """
    left = not generating(model).config.is_encoder_decoder
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
