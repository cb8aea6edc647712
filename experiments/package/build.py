"""Writes an exported model as one file of compiled programs, if its answers are those of the model."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from antgmm_jax.errors import AntgmmError
from antgmm_jax.io.files import one_line
from antgmm_jax.io.folders import claimed, new_file, temporary_folder, writing
from experiments.package.requests import Prompt, Shape, shaped, taken
from experiments.report.latency import Request
from experiments.run.export.export_gate import TOLERANCE
from experiments.run.export.in_torch import split


class Form(NamedTuple):
    """What a kind of package adds to `build`: how its file is written and read, and the answers it must give.

    Attributes:
        engine: what the package is compared with, for messages.
        left: whether padding stands before the tokens of a prompt.
        answers: prompts -> greedy answers of the model, int [B, N], padded after their end.
        logits: training batch -> logits of the model at answer positions, [B, A, V].
        gap: (prompt of one row, step, two token ids) -> difference of the model's logits of the two tokens in the
            greedy answer; infinity if it ends before.
        write: (shape -> prompts of this shape, file) -> nothing; writes the programs.
        load: (file, shape) -> function from prompts of the shape to answers, int [B, N].
        requests: (file, shape, prompts of the shape) -> requests to the package and to others, to be timed in turn.
    """

    engine: str
    left: bool
    answers: Callable[[Prompt], np.ndarray]
    logits: Callable[[Mapping[str, Any]], np.ndarray]
    gap: Callable[[Prompt, int, tuple[int, int]], float]
    write: Callable[[Mapping[Shape, Prompt], Path], None]
    load: Callable[[Path, Shape], Callable[[Prompt], np.ndarray]]
    requests: Callable[[Path, Shape, Prompt], Mapping[str, Request]]


class Packaged(NamedTuple):
    """Comparison of a package with the model.

    Attributes:
        prompts: number of prompts.
        equal: number of equal answers; answers that differ after a tie are equal.
        ties: number of answers that differ after a tie.
        where: description of the first different answer; "" if there is none.
    """

    prompts: int
    equal: int
    ties: int
    where: str = ""


def build(out: Path, batches: Sequence[Mapping[str, Any]], shapes: Sequence[Shape], form: Form) -> Packaged:
    """Compiles a model for some shapes of prompts, compares answers, and writes the file if all are equal.

    Args:
        out: file to write.
        batches: training batches with the prompts alone under `prompt/`, and the numbers of the samples as `index`.
        shapes: shapes of the programs.
        form: kind of package.

    Returns:
        The comparison; a row that fills up a batch again counts once.

    Raises:
        AntgmmError: the model cannot be compiled, a prompt is wider than every shape or all are wider than one of them,
            answers differ, or the disk is full.
    """
    prompts = [split(batch)[1] for batch in batches]
    needed, widest = longest(batches), max(shape.width for shape in shapes)
    if needed > widest:
        raise AntgmmError(f"the longest prompt has {needed} tokens: add --width {needed}")
    examples = {shape: example(batches, shape, left=form.left) for shape in shapes}
    wanted, results = [form.answers(prompt) for prompt in prompts], []
    first = [np.unique(batch["index"], return_index=True)[1] for batch in batches]

    @cache
    def bound() -> float:
        """Two logits may change their order within this if each is off by the tolerance of an export."""
        return 2 * TOLERANCE * max(1.0, *(float(np.abs(form.logits(batch)).max()) for batch in batches))

    with writing(out), claimed(out), temporary_folder(out) as folder:
        file = folder / f"model{out.suffix}"
        form.write(examples, file)
        for shape in shapes:
            with one_line(lambda: f"{out} is not written: cannot load it", "free space for temporary files (TMPDIR)"):
                answer = form.load(file, shape)
            results += [
                _compared(form, prompt, np.intersect1d(_rows(prompt, shape), own), answers, bound, answer, shape)
                for prompt, own, answers in zip(prompts, first, wanted, strict=True)
            ]
        if different := [result.where for result in results if result.where]:
            raise AntgmmError(f"{out} is not written: {different[0]}")
        with new_file(out) as unfinished:
            file.replace(unfinished)
    counts, equal, ties, _ = zip(*results, strict=True)
    return Packaged(sum(counts), sum(equal), sum(ties))


def longest(batches: Iterable[Mapping[str, Any]]) -> int:
    """Returns the number of tokens of the longest prompt of training batches."""
    return max(int(batch["prompt/attention_mask"].sum(1).max()) for batch in batches)


def example(batches: Iterable[Mapping[str, Any]], shape: Shape, *, left: bool) -> dict[str, Any]:
    """Returns prompts in a shape, those with the most images of the batch with the most image slots.

    Args:
        batches: as for `build`.
        shape: rows and tokens per row.
        left: whether padding stands before the tokens.

    Raises:
        AntgmmError: no prompt is short enough.
    """
    size, chosen = (False, -1), None
    for prompt in (split(batch)[1] for batch in batches):
        rows, valid = _rows(prompt, shape), prompt["images"]["valid"]
        used = valid[rows].sum(axis=1)
        if len(rows) and (larger := (bool(used.any()), valid.shape[1])) > size:
            size, chosen = larger, (prompt, rows[np.argsort(-used, kind="stable")])
    if chosen is None:
        raise AntgmmError(f"no prompt has at most {shape.width} tokens: leave out --width {shape.width}")
    return shaped(*chosen, shape, left=left)


def _rows(prompt: Prompt, shape: Shape) -> np.ndarray:
    """Numbers of the prompts that are short enough for a shape."""
    return np.flatnonzero(prompt["attention_mask"].sum(1) <= shape.width)


def _compared(
    form: Form,
    prompt: Prompt,
    rows: np.ndarray,
    wanted: np.ndarray,
    bound: Callable[[], float],
    answer: Callable[[Prompt], np.ndarray],
    shape: Shape,
) -> Packaged:
    """Compares the answers of one shape's programs to some prompts of a batch."""
    equal, ties, where = 0, 0, ""
    for begin in range(0, len(rows), shape.rows):
        chosen = rows[begin : begin + shape.rows]
        for row, given in zip(chosen, answer(shaped(prompt, chosen, shape, left=form.left)), strict=False):
            different = given != wanted[row]
            if different.any():
                step = int(different.argmax())
                ids = int(given[step]), int(wanted[row, step])
                tie = form.gap(taken(prompt, np.array([row])), step, ids) <= bound()
                ties += tie
                where = where or (
                    "" if tie else f"an answer differs: {given.tolist()}, {form.engine}: {wanted[row].tolist()}"
                )
            equal += not different.any()
    return Packaged(len(rows), equal + ties, ties, where)
