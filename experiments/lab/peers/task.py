"""The common task of all contenders: settings, text as token ids, and padded rows. It needs only NumPy."""

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

PAD, IGNORE = 0, -100
EPOCHS = 3
"""Epochs of a complete training, whose time includes building the cache."""

SETTINGS, TEXT, BUCKETED = "task.json", "text.npz", "bucketed.npy"
_RESERVED = 4  # smaller ids are not words: padding, start, end and image token


@dataclass(frozen=True)
class Task:
    """Settings of the task, equal for all contenders.

    Args:
        rows: samples of the data set.
        batch: samples per step.
        vocab: size of the vocabulary of teacher and student.
        student, teacher: layers, width, heads and MLP width of a Llama with tied embeddings.
        prompt, answer: minimum and maximum number of tokens; lengths are log-uniformly distributed.
        multiple: for contenders that compile per shape, batches are padded to a multiple of it.
        learning_rate, weight_decay: settings of AdamW at a constant rate; norms are not decayed.
        seed: seed of weights, text and order.
    """

    rows: int = 192
    batch: int = 8
    vocab: int = 4096
    student: tuple[int, int, int, int] = (6, 192, 6, 576)
    teacher: tuple[int, int, int, int] = (12, 640, 10, 1920)
    prompt: tuple[int, int] = (16, 160)
    answer: tuple[int, int] = (4, 32)
    multiple: int = 32
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    seed: int = 0

    @property
    def steps(self) -> int:
        """Steps per epoch."""
        return self.rows // self.batch

    @property
    def widths(self) -> tuple[int, ...]:
        """All possible widths of a padded batch, ascending."""
        return tuple(range(self.multiple, self.width(self.prompt[1] + self.answer[1]) + 1, self.multiple))

    def width(self, length: int) -> int:
        """Rounds a length up to a multiple of `multiple`."""
        return -(-int(length) // self.multiple) * self.multiple


class Text(NamedTuple):
    """Token ids of all rows.

    Attributes:
        ids: prompt and answer of each row, int32.
        prompts: number of prompt tokens of each row, int [N]; the other tokens are the answer.
    """

    ids: list[np.ndarray]
    prompts: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, int [N]."""
        return np.array([len(row) for row in self.ids])


def draw(task: Task) -> Text:
    """Draws text with log-uniform lengths and words by Zipf's law (frequency of the n-th word ~ 1 / n).

    Args:
        task: settings of the task.

    Returns:
        The text.
    """
    rng = np.random.default_rng(task.seed)

    def lengths(low: int, high: int) -> np.ndarray:
        return np.exp(rng.uniform(np.log(low), np.log(high + 1), task.rows)).astype(int)

    prompts, answers = lengths(*task.prompt), lengths(*task.answer)
    words = task.vocab - _RESERVED
    often = 1 / np.arange(1, words + 1)
    drawn = rng.choice(words, int((prompts + answers).sum()), p=often / often.sum()) + _RESERVED
    ends = np.cumsum(prompts + answers)[:-1]
    return Text([row.astype(np.int32) for row in np.split(drawn, ends)], prompts)


def padded(task: Task, text: Text, rows: np.ndarray, width: int) -> dict[str, np.ndarray]:
    """Pads rows on the right.

    Args:
        task: settings of the task; A is the maximum answer length.
        text: all rows.
        rows: row numbers [B].
        width: columns, at least the length of the longest row.

    Returns:
        int32 `input_ids`, `attention_mask` [B, width]; `positions` of the logits that predict answer tokens and
        `targets` (these tokens, -100 for none) [B, A].
    """
    size, answers = len(rows), task.answer[1]
    ids, mask = np.full((size, width), PAD, np.int32), np.zeros((size, width), np.int32)
    positions, targets = np.zeros((size, answers), np.int32), np.full((size, answers), IGNORE, np.int32)
    for place, row in enumerate(rows):
        tokens, prompt = text.ids[row], int(text.prompts[row])
        ids[place, : len(tokens)], mask[place, : len(tokens)] = tokens, 1
        answer = tokens[prompt:]
        positions[place, : len(answer)] = np.arange(prompt - 1, len(tokens) - 1)
        targets[place, : len(answer)] = answer
    return {"input_ids": ids, "attention_mask": mask, "positions": positions, "targets": targets}


def planned(task: Task, text: Text, plan: np.ndarray) -> Iterator[dict[str, np.ndarray]]:
    """Iterates over the batches of a plan, each padded to the width of its longest row.

    Args:
        task: settings of the task.
        text: all rows.
        plan: row numbers [steps, batch].

    Yields:
        Batches from `padded`.
    """
    lengths = text.lengths
    for rows in plan:
        yield padded(task, text, rows, task.width(lengths[rows].max()))


def in_order(task: Task) -> np.ndarray:
    """Returns a plan with the rows in file order, [steps, batch]."""
    return np.arange(task.steps * task.batch).reshape(task.steps, task.batch)


def write(task: Task, text: Text, folder: Path) -> None:
    """Writes settings and text."""
    np.savez(folder / TEXT, ids=np.concatenate(text.ids), lengths=text.lengths, prompts=text.prompts)
    (folder / SETTINGS).write_text(json.dumps(dataclasses.asdict(task), indent=1) + "\n")


def read(folder: Path) -> tuple[Task, Text]:
    """Reads settings and text from a folder of `write`."""
    settings: dict[str, Any] = json.loads((folder / SETTINGS).read_text())
    settings |= {name: tuple(value) for name, value in settings.items() if isinstance(value, list)}
    task = Task(**settings)
    with np.load(folder / TEXT) as arrays:
        ids = np.split(arrays["ids"], np.cumsum(arrays["lengths"])[:-1])
        return task, Text(ids, arrays["prompts"])
