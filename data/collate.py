"""Collation of encoded rows into padded token ids, loss targets and image slots."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from antgmm_jax.blocks.tokens import IGNORE
from antgmm_jax.errors import AntgmmError
from data.encoding import Encoder
from data.index import Index
from data.record import Arrays


class Layout(NamedTuple):
    """Token layout that a model expects in a batch.

    Attributes:
        apart: whether an encoder reads the prompt and a decoder the answer.
        pad: padding token.
        start: first decoder token, if `apart`.
    """

    apart: bool
    pad: int
    start: int


class Shape(NamedTuple):
    """Shape of a batch: columns of text, columns of answers, and image slots."""

    text: int
    answer: int
    slots: int


class Needs(NamedTuple):
    """Columns of text, columns of answer tokens, and image slots that each row needs, int [N]."""

    text: Int[np.ndarray, " N"]
    answer: Int[np.ndarray, " N"]
    slots: Int[np.ndarray, " N"]

    def of(self, rows: np.ndarray) -> Shape:
        """Returns the smallest shape for the given rows."""
        return Shape(*(int(each[rows].max()) for each in self))

    def at(self, rows: np.ndarray) -> "Needs":
        """Returns the needs of the given rows."""
        return Needs(*(each[rows] for each in self))

    def alike(self) -> Iterator[Int[np.ndarray, " R"]]:
        """Iterates over groups of rows, largest first, in which none needs more than four times the slots of another.

        A batch has the slots of its largest row, so one picture of 4 000 slots would make all batches as large.
        """
        slots = np.maximum(self.slots, 1)
        # The power of 4 by which a row is below the largest one; a small tolerance for numbers that are such powers.
        below = np.floor(np.log(slots.max() / slots) / np.log(4) + 1e-9)
        for power in np.unique(below):
            yield np.flatnonzero(below == power)


class Widths(NamedTuple):
    """Allowed sizes of a batch in each dimension, ascending; every combination is compiled separately."""

    text: tuple[int, ...]
    answer: tuple[int, ...]
    slots: tuple[int, ...]

    @property
    def largest(self) -> Shape:
        """The shape that holds all rows."""
        return Shape(*(allowed[-1] for allowed in self))

    def groups(self, needs: Needs) -> Int[np.ndarray, " N"]:
        """Returns the number of the shape that each row needs."""
        group = np.zeros(len(needs.text), np.int32)
        for widths, need in zip(self, needs, strict=True):
            if need.max(initial=0) > widths[-1]:
                raise AntgmmError(f"the largest bucket is {widths[-1]}, but a row needs {need.max()}: add a bucket")
            group = group * np.int32(len(widths)) + np.searchsorted(widths, need).astype(np.int32)
        return group

    def holds(self, shape: Shape) -> Shape:
        """Returns the smallest allowed shape that is at least `shape`."""
        return Shape(*(each[int(np.searchsorted(each, need))] for each, need in zip(self, shape, strict=True)))


class Alike(NamedTuple):
    """Shapes of batches whose rows need similar numbers of image slots: one for each group, ascending."""

    shapes: tuple[Shape, ...]

    @classmethod
    def of(cls, needs: Needs, apart: bool) -> "Alike":
        """Returns the shapes for the groups of `Needs.alike`, as `widths` without buckets has them."""
        shapes = (widths(needs.at(rows), apart).largest for rows in needs.alike())
        return cls(tuple(sorted(shapes, key=lambda shape: shape.slots)))

    def groups(self, needs: Needs) -> Int[np.ndarray, " N"]:
        """Returns the number of the shape that each row needs."""
        return np.searchsorted([shape.slots for shape in self.shapes], needs.slots).astype(np.int32)

    def holds(self, shape: Shape) -> Shape:
        """Returns the shape for rows that need at most `shape`: of leftover rows of several groups, a larger one."""
        place = next(each for each in self.shapes if each.slots >= shape.slots)
        most = Shape(*map(max, zip(*self.shapes, strict=True)))
        text = place.text if shape.text <= place.text else most.text
        return Shape(text, place.answer if shape.answer <= place.answer else most.answer, place.slots)


def layout(encoder: Encoder, start: int) -> Layout:
    """Returns the token layout for an encoder's model; `start` is the first token of its decoder."""
    return Layout(encoder.inputs.encoder_decoder, encoder.pad, start)


def needs(index: Index, apart: bool) -> Needs:
    """Returns what each row needs; unless `apart`, the text includes the answer. Answers of earlier turns count."""
    text = index.prompt if apart else index.prompt + index.answer
    return Needs(text, index.answer + index.earlier, index.slots)


def bucket(length: int, multiple: int = 8) -> int:
    """Rounds a length up to a multiple, so that few shapes are compiled."""
    return -(-length // multiple) * multiple


def widths(rows: Needs, apart: bool, *, buckets: Sequence[int] = (), prompt_buckets: Sequence[int] = ()) -> Widths:
    """Returns the allowed batch shapes; a single one without buckets.

    With buckets, the number of image slots grows by at most a half from one bucket to the next: 2, 3, 4, 6, 8, 12, ...

    Args:
        rows: what each row needs.
        apart: whether an encoder reads the prompt and a decoder the answer.
        buckets: columns of answers if `apart`, else of text.
        prompt_buckets: columns of text if `apart`.

    Returns:
        Allowed sizes; the last one in each dimension fits all rows and, for text and answers, is a multiple of 8.
    """
    text, answer = (prompt_buckets, buckets) if apart else (buckets, ())
    most = max(1, int(rows.slots.max()))
    steps = sorted({1, *(n << power for power in range(most.bit_length()) for n in (2, 3))})
    slots = steps if buckets or prompt_buckets else []
    full = (bucket(int(rows.text.max())), bucket(int(rows.answer.max())), most)
    allowed = (
        (*(w for w in narrower if w < widest), widest)
        for narrower, widest in zip((text, answer, slots), full, strict=True)
    )
    return Widths(*allowed)


def padded(rows: Sequence[np.ndarray], width: int, fill: int, *, left: bool = False) -> np.ndarray:
    """Pads rows of numbers to int32 [N, width], on the right or on the left."""
    out = np.full((len(rows), width), fill, np.int32)
    for place, row in enumerate(rows):
        if len(row):
            out[place, width - len(row) if left else 0 : width if left else len(row)] = row
    return out


def _mask(rows: Sequence[np.ndarray], width: int, *, left: bool = False) -> np.ndarray:
    return padded([np.ones(len(row), np.int32) for row in rows], width, 0, left=left)


def text(rows: Sequence[Arrays], layout: Layout, shape: Shape) -> Arrays:
    """Collates encoded rows for training, padded on the right.

    The loss reads `positions` (positions of the logits that predict the answer tokens, those of earlier turns first)
    and `targets` (these tokens, -100 for none).

    Args:
        rows: encoded rows with `prompt`, `answer` and, for several turns and unless `layout.apart`, `earlier`.
        layout: token layout of the model.
        shape: shape of the batch.

    Returns:
        int32 arrays `input_ids`, `attention_mask` [N, text], `labels`, `positions`, `targets` [N, answer]; for an
        encoder-decoder also `decoder_input_ids` [N, answer], else `labels` are [N, text].
    """
    prompts, answers = [row["prompt"] for row in rows], [row["answer"] for row in rows]
    if layout.apart:
        targets = padded(answers, shape.answer, IGNORE)
        shifted = [np.append(layout.start, answer[:-1]) for answer in answers]
        return {
            "input_ids": padded(prompts, shape.text, layout.pad),
            "attention_mask": _mask(prompts, shape.text),
            "decoder_input_ids": padded(shifted, shape.answer, layout.pad),
            "labels": targets.copy(),
            "positions": np.tile(np.arange(shape.answer, dtype=np.int32), (len(rows), 1)),
            "targets": targets,
        }
    joined = [np.concatenate(pair) for pair in zip(prompts, answers, strict=True)]
    trained = [trained_tokens(row) for row in rows]
    labels = np.full((len(rows), shape.text), IGNORE, np.int32)
    for line, ids, places in zip(labels, joined, trained, strict=True):
        line[places] = ids[places]
    return {
        "input_ids": padded(joined, shape.text, layout.pad),
        "attention_mask": _mask(joined, shape.text),
        "labels": labels,
        "positions": padded([places - 1 for places in trained], shape.answer, 0),
        "targets": padded([ids[at] for ids, at in zip(joined, trained, strict=True)], shape.answer, IGNORE),
    }


def trained_tokens(row: Arrays) -> Int[np.ndarray, " A"]:
    """Places of the answer tokens of an encoded row in its prompt and answer together, ascending."""
    start = len(row["prompt"])
    last = np.arange(start, start + len(row["answer"]))
    return np.concatenate([row["earlier"], last]) if "earlier" in row else last


def prompts(rows: Sequence[Arrays], layout: Layout, width: int) -> Arrays:
    """Collates prompts for generation; padded on the left for decoder-only models.

    Args:
        rows: encoded rows with `prompt`.
        layout: token layout of the model.
        width: columns.

    Returns:
        `input_ids`, `attention_mask` int32 [N, width].
    """
    ids, left = [row["prompt"] for row in rows], not layout.apart
    return {
        "input_ids": padded(ids, width, layout.pad, left=left),
        "attention_mask": _mask(ids, width, left=left),
    }


def pictures(trees: Sequence[Sequence[Arrays]], slots: int) -> Arrays:
    """Collates images into the image slots of a batch.

    Args:
        trees: for each row the image trees of its samples, leaves [m, ...], placed one after another.
        slots: slots per row; unused ones are zero.

    Returns:
        `valid` bool [B, slots], and every leaf [B, slots, ...].
    """
    like = next(tree for row in trees for tree in row)
    valid = np.zeros((len(trees), slots), bool)
    out = {name: np.zeros((len(trees), slots, *leaf.shape[1:]), leaf.dtype) for name, leaf in like.items()}
    for place, row in enumerate(trees):
        at = 0
        for tree in row:
            count = len(next(iter(tree.values()), ()))
            for name, leaf in tree.items():
                out[name][place, at : at + count] = leaf
            at += count
        valid[place, :at] = True
    return {"valid": valid, **out}
