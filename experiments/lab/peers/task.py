"""The task that all contenders are given: its settings, its text as token ids, and padded rows. numpy alone."""

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

PAD, IGNORE = 0, -100
EPOCHS = 3
"""Epochs that a whole training is counted over, the making of a cache among its seconds."""

SETTINGS, TEXT, BUCKETED = "task.json", "text.npz", "bucketed.npy"
_RESERVED = 4  # ids below this are no words: padding, start, end, and the placeholder of an image


@dataclass(frozen=True)
class Task:
    """What is trained, on what, and how; equal for every contender.

    Args:
        rows: samples of the data set.
        batch: samples of a step.
        vocab: size of the token table that teacher and student share.
        student, teacher: layers, width, heads and feed-forward width of a Llama with tied embeddings.
        prompt, answer: least and greatest number of tokens; a row has one of each, drawn evenly on a logarithmic scale.
        multiple: widths that batches are padded to are multiples of it, where a contender compiles by shape.
        learning_rate, weight_decay: of AdamW at a constant rate; norms are not decayed.
        seed: of weights, text and order.
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
        """Steps of an epoch."""
        return self.rows // self.batch

    @property
    def widths(self) -> tuple[int, ...]:
        """Every width that a padded batch can have, ascending."""
        return tuple(range(self.multiple, self.width(self.prompt[1] + self.answer[1]) + 1, self.multiple))

    def width(self, length: int) -> int:
        """The smallest multiple that holds a length."""
        return -(-int(length) // self.multiple) * self.multiple


class Text(NamedTuple):
    """Token ids of all rows.

    Attributes:
        ids: prompt and answer of each row, int32.
        prompts: tokens of each row's prompt, int [N]; the rest of the row is its answer.
    """

    ids: list[np.ndarray]
    prompts: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, int [N]."""
        return np.array([len(row) for row in self.ids])


def draw(task: Task) -> Text:
    """Seeded text: lengths even on a logarithmic scale, words by Zipf's law (the n-th as often as 1 / n).

    Args:
        task: rows, lengths, vocabulary and seed.

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
    """Rows as arrays, padded on the right.

    Args:
        task: the greatest length of an answer gives A.
        text: all rows.
        rows: which of them, [B].
        width: columns, at least the longest row.

    Returns:
        int32 `input_ids`, `attention_mask` [B, width]; `positions` (of the logits that predict an answer token) and
        `targets` (that token, -100 for none) [B, A].
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
    """Batches of a plan, each padded to the width that its longest row needs.

    Args:
        task: batch size and widths.
        text: all rows.
        plan: row numbers [steps, batch].

    Yields:
        What `padded` gives.
    """
    lengths = text.lengths
    for rows in plan:
        yield padded(task, text, rows, task.width(lengths[rows].max()))


def in_order(task: Task) -> np.ndarray:
    """The plan that takes rows in the order of the file, [steps, batch]."""
    return np.arange(task.steps * task.batch).reshape(task.steps, task.batch)


def write(task: Task, text: Text, folder: Path) -> None:
    """Writes settings and text."""
    np.savez(folder / TEXT, ids=np.concatenate(text.ids), lengths=text.lengths, prompts=text.prompts)
    (folder / SETTINGS).write_text(json.dumps(dataclasses.asdict(task), indent=1) + "\n")


def read(folder: Path) -> tuple[Task, Text]:
    """Settings and text that `write` left in a folder."""
    settings: dict[str, Any] = json.loads((folder / SETTINGS).read_text())
    settings |= {name: tuple(value) for name, value in settings.items() if isinstance(value, list)}
    task = Task(**settings)
    with np.load(folder / TEXT) as found:
        ids = np.split(found["ids"], np.cumsum(found["lengths"])[:-1])
        return task, Text(ids, found["prompts"])
