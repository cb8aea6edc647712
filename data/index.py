"""Index of encoded records: small numbers per record, kept in memory."""

from typing import NamedTuple

import numpy as np


class Index(NamedTuple):
    """Sizes and types of encoded records, kept in memory.

    Attributes:
        prompt: number of prompt tokens, including image tokens, int32 [N].
        answer: number of tokens of the last answer, including the end token, int32 [N].
        earlier: number of tokens of the answers in the prompt, int32 [N].
        slots: number of image slots, int32 [N].
        types: type of the question as an index into `names`, int32 [N].
        names: names of the types.
        fingerprint: digest of all token ids and pixels.
    """

    prompt: np.ndarray
    answer: np.ndarray
    earlier: np.ndarray
    slots: np.ndarray
    types: np.ndarray
    names: tuple[str, ...]
    fingerprint: str


COLUMNS = ("prompt", "answer", "earlier", "slots", "types")
"""Fields of `Index` with a number for each record."""
