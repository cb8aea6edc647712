"""What a family gives to whoever reads records for it."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from transformers import ProcessorMixin


class Inputs(Protocol):
    """The host side of a family: a record as token ids and a tree of pictures.

    Attributes:
        processor: of the checkpoint; the tokenizer is its `tokenizer`.
        encoder_decoder: whether prompt and answer are read apart.
    """

    processor: ProcessorMixin
    encoder_decoder: bool

    def prompt(self, line: str, pictures: int) -> str:
        """The text given to the processor beside so many pictures."""
        ...

    def __call__(self, line: str, images: Sequence[np.ndarray]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Prompt token ids int32 [T], each picture's tokens among them, and the pictures' tree, leaves [M, ...]."""
        ...

    def torch(self, images: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """A batch's pictures, leaves [B, M, ...], as the arrays that the PyTorch model takes."""
        ...
