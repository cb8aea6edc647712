"""Rows of a teacher cache as bytes: states without their padding.

A record is the number of positions (or image slots) of each state, int32, then the states, one after another.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import ml_dtypes
import numpy as np

Shapes = dict[str, tuple[int, ...]]
Ragged = Literal["answer", "text", "slots"]
FORMAT = 3
"""Version of the format; increase it to have old caches built again."""
_TEXT: dict[str, Ragged] = {"encoder": "text", "text": "text", "decoder": "answer"}
_HEAD = np.dtype(np.int32)


def at_answers(name: str) -> bool:
    """Whether a state is what the teacher's head reads, one for each answer token: `final`, or of `distill.top`."""
    return name == "final" or name.startswith("top/")


def dtype_of(name: str) -> np.dtype:
    """Returns the dtype of a state, of two bytes."""
    return np.dtype(np.uint16 if name.startswith("top/") else ml_dtypes.bfloat16)


def ragged(name: str) -> Ragged:
    """Returns what the rows of a state have different numbers of: answer tokens, tokens of text, or image slots."""
    tower = name.split("/")[0]
    return "answer" if at_answers(name) else _TEXT.get(tower, "slots")


def has_image_slots(name: str) -> bool:
    """Whether states of this name have one entry per image slot (not one per sample)."""
    return ragged(name) == "slots"


def axis_of(name: str) -> int:
    """Returns the axis of `ragged` in an array with rows first."""
    return 1 if at_answers(name) or has_image_slots(name) else 2


def record(states: Mapping[str, np.ndarray], counts: np.ndarray) -> bytes:
    """Returns a row as bytes.

    Args:
        states: name -> padded states of the row, without an axis of rows.
        counts: number of positions or image slots of each state that are not padding, int [names].

    Returns:
        The record.
    """
    used = [
        x[(slice(None),) * (axis_of(name) - 1) + (slice(int(n)),)]
        for (name, x), n in zip(states.items(), counts, strict=True)
    ]
    return np.asarray(counts, _HEAD).tobytes() + b"".join(np.ascontiguousarray(x).tobytes() for x in used)


def restored(records: Sequence[bytes], shapes: Shapes, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Reads states of several rows.

    Args:
        records: from `record`.
        shapes: name -> shape of the longest row, of all states in the order of the record.
        names: states to read.

    Returns:
        name -> [B, *shape] of its `dtype_of`, with zeros for padding.
    """
    arrays = {name: np.zeros((len(records), *shapes[name]), dtype_of(name)) for name in names}
    for row, content in enumerate(records):
        start = len(shapes) * _HEAD.itemsize
        for (name, full), count in zip(shapes.items(), np.frombuffer(content, _HEAD, len(shapes)), strict=True):
            axis = axis_of(name) - 1
            shape = (*full[:axis], int(count), *full[axis + 1 :])
            size = math.prod(shape)
            if name in arrays:
                place = (row, *(slice(None),) * axis, slice(int(count)))
                arrays[name][place] = np.frombuffer(content, dtype_of(name), size, start).reshape(shape)
            start += 2 * size
    return arrays


def total_bytes(shapes: Shapes, totals: Mapping[Ragged, int], samples: int) -> dict[str, int]:
    """Returns the size of the records of all rows.

    Args:
        shapes: name -> shape of the longest row.
        totals: sum over all rows of answer tokens, tokens of text and image slots.
        samples: number of rows.

    Returns:
        name -> bytes.
    """

    def one(name: str, shape: Sequence[int]) -> int:
        axis = axis_of(name) - 1
        each = math.prod((*shape[:axis], *shape[axis + 1 :]))
        return 2 * each * totals[ragged(name)] + _HEAD.itemsize * samples

    return {name: one(name, shape) for name, shape in shapes.items()}


def lengths(batch: Mapping[str, Any], names: Sequence[str], *, ignored: int) -> list[Any]:
    """Returns the number of positions or image slots of each row of a batch that are not padding.

    Args:
        batch: a batch, padded on the right.
        names: states.
        ignored: target of a position without an answer token.

    Returns:
        int32 [B] for each name.
    """
    counted = {
        "answer": lambda: (batch["targets"] != ignored).sum(axis=1),
        "text": lambda: (batch["attention_mask"] != 0).sum(axis=1),
        "slots": lambda: batch["images"]["valid"].sum(axis=1),
    }
    return [counted[ragged(name)]() for name in names]
