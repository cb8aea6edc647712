"""Writing of a task as files that a user would bring: JSONL and PNG."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from data.record import Record
from data.writers import Progress, write_lines

Draw = Callable[[np.random.Generator, str], Record]
"""(random numbers, split) -> record."""
SEEDS = {"train": 5, "test": 4}
"""Split -> seed of its records."""


def in_split(count: int, split: str) -> np.ndarray:
    """Which of a number of things, bool [count], a split shows: every fifth is for tests."""
    tests = np.arange(count) % 5 == 0
    return tests if split == "test" else ~tests


class Drawn(Sequence[Record]):
    """Records that are drawn on access, always the same ones.

    Args:
        draw: draws a record.
        split: "train" or "test".
        count: number of records.
    """

    def __init__(self, draw: Draw, split: str, count: int):
        self._draw, self._split, self._count = draw, split, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Record:
        return self._draw(np.random.default_rng([SEEDS[self._split], range(self._count)[index]]), self._split)


def write(draw: Draw, directory: Path, sizes: dict[str, int], progress: Progress) -> None:
    """Writes the splits of a task as `SPLIT.jsonl` with pictures in `images`; a split that is there is kept.

    Args:
        draw: draws a record.
        directory: folder to create.
        sizes: split -> number of records.
        progress: called with (file name, records done, number of records).
    """
    for split, count in sizes.items():
        if not (directory / f"{split}.jsonl").exists():
            write_lines(Drawn(draw, split, count), directory / f"{split}.jsonl", _line, progress)


def _line(row: int, record: Record, names: Sequence[str]) -> dict:
    words = {"question": record.question, "answer": record.answer, "type": record.type}
    return {"id": f"{row}", "image": names[0], **words, "latents": dict(record.latents)}
