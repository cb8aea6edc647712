"""Encoded rows side by side: padded token ids, what the loss reads, and pictures in the slots of a batch."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from antgmm_jax.errors import AntgmmError
from data.encoding import Encoder
from data.record import Arrays
from data.store import Index

IGNORE = -100


class Layout(NamedTuple):
    """How a model reads a batch.

    Attributes:
        apart: whether prompt and answer are read apart, by an encoder and a decoder.
        pad: the token that fills rows.
        start: the first token that such a decoder reads.
    """

    apart: bool
    pad: int
    start: int


class Shape(NamedTuple):
    """Columns of a batch, or what each row needs of them: of text, of answers, and picture slots."""

    text: int
    answer: int
    slots: int


class Needs(NamedTuple):
    """What each row of some data needs, int [N]: columns of text, of answers, and picture slots."""

    text: Int[np.ndarray, " N"]
    answer: Int[np.ndarray, " N"]
    slots: Int[np.ndarray, " N"]

    def of(self, rows: np.ndarray) -> Shape:
        """The shape that holds some rows, no wider than they need."""
        return Shape(*(int(each[rows].max()) for each in self))


class Widths(NamedTuple):
    """The shapes that batches may have, in each dimension ascending; each choice of three is a compiled program."""

    text: tuple[int, ...]
    answer: tuple[int, ...]
    slots: tuple[int, ...]

    def groups(self, needs: Needs) -> Int[np.ndarray, " N"]:
        """Which of the shapes each row needs, by number."""
        found = np.zeros(len(needs.text), np.int32)
        for widths, need in zip(self, needs, strict=True):
            if need.max(initial=0) > widths[-1]:
                raise AntgmmError(f"the widest bucket is {widths[-1]} but a row needs {need.max()}: add a bucket")
            found = found * np.int32(len(widths)) + np.searchsorted(widths, need).astype(np.int32)
        return found

    def holds(self, shape: Shape) -> Shape:
        """The narrowest of the shapes that holds another."""
        return Shape(*(each[int(np.searchsorted(each, need))] for each, need in zip(self, shape, strict=True)))


def layout(encoder: Encoder, start: int) -> Layout:
    """How the model of an encoder reads batches. `start`: the first token of its decoder."""
    return Layout(encoder.inputs.encoder_decoder, encoder.pad, start)


def needs(index: Index, apart: bool) -> Needs:
    """What each row needs; where prompt and answer are not read apart, its text holds both."""
    return Needs(index.prompt if apart else index.prompt + index.answer, index.answer, index.slots)


def bucket(length: int, multiple: int = 8) -> int:
    """The smallest multiple that holds a length: few shapes mean few compilations."""
    return -(-length // multiple) * multiple


def widths(rows: Needs, apart: bool, *, buckets: Sequence[int] = (), prompt_buckets: Sequence[int] = ()) -> Widths:
    """The shapes that batches of some rows are cut to; without buckets one, that holds them all.

    Picture slots double from one bucket to the next.

    Args:
        rows: what each needs.
        apart: whether prompt and answer are read apart.
        buckets: columns of answers where they are read apart, else of text.
        prompt_buckets: columns of text, where prompt and answer are read apart.

    Returns:
        The widths, each dimension with the full one, a multiple of 8, as its last.
    """
    text, answer = (prompt_buckets, buckets) if apart else (buckets, ())
    most = max(1, int(rows.slots.max()))
    slots = [2**power for power in range(most.bit_length())] if buckets or prompt_buckets else []
    full = (bucket(int(rows.text.max())), bucket(int(rows.answer.max())), most)
    cut = (
        (*(w for w in narrower if w < widest), widest)
        for narrower, widest in zip((text, answer, slots), full, strict=True)
    )
    return Widths(*cut)


def padded(rows: Sequence[Sequence[int] | np.ndarray], width: int, fill: int, *, left: bool = False) -> np.ndarray:
    """Rows of numbers as int32 [N, width], filled on the right or on the left."""
    out = np.full((len(rows), width), fill, np.int32)
    for place, row in enumerate(rows):
        if len(row):
            out[place, width - len(row) if left else 0 : width if left else len(row)] = row
    return out


def _mask(rows: Sequence[np.ndarray], width: int, *, left: bool = False) -> np.ndarray:
    return padded([np.ones(len(row), np.int32) for row in rows], width, 0, left=left)


def text(rows: Sequence[Arrays], about: Layout, shape: Shape) -> Arrays:
    """Training arrays of encoded rows, padded on the right.

    The loss reads `positions` (where along the logits the state that predicts an answer token stands) and `targets`
    (that token, -100 for none).

    Args:
        rows: with `prompt` and `answer`.
        about: how the model reads them.
        shape: columns.

    Returns:
        int32 arrays: `input_ids`, `attention_mask` [N, text], `labels`, `positions`, `targets` [N, answer]; read apart
        also `decoder_input_ids` [N, answer]. Where they are not, `labels` are [N, text].
    """
    prompts, answers = [row["prompt"] for row in rows], [row["answer"] for row in rows]
    targets = padded(answers, shape.answer, IGNORE)
    if about.apart:
        return {
            "input_ids": padded(prompts, shape.text, about.pad),
            "attention_mask": _mask(prompts, shape.text),
            "decoder_input_ids": padded([[about.start, *row[:-1]] for row in answers], shape.answer, about.pad),
            "labels": targets.copy(),
            "positions": np.tile(np.arange(shape.answer, dtype=np.int32), (len(rows), 1)),
            "targets": targets,
        }
    joined = [np.concatenate(pair) for pair in zip(prompts, answers, strict=True)]
    pairs = list(zip(prompts, answers, strict=True))
    hidden = [np.concatenate([np.full(len(a), IGNORE, np.int32), b]) for a, b in pairs]
    return {
        "input_ids": padded(joined, shape.text, about.pad),
        "attention_mask": _mask(joined, shape.text),
        "labels": padded(hidden, shape.text, IGNORE),
        "positions": padded([range(len(a) - 1, len(a) + len(b) - 1) for a, b in pairs], shape.answer, 0),
        "targets": targets,
    }


def prompts(rows: Sequence[Arrays], about: Layout, width: int) -> Arrays:
    """Prompts for generation, on the left of their padding where a decoder goes on from them.

    Args:
        rows: with `prompt`.
        about: how the model reads them.
        width: columns.

    Returns:
        `input_ids`, `attention_mask` int32 [N, width].
    """
    ids, left = [row["prompt"] for row in rows], not about.apart
    return {
        "input_ids": padded(ids, width, about.pad, left=left),
        "attention_mask": _mask(ids, width, left=left),
    }


def pictures(trees: Sequence[Sequence[Arrays]], slots: int) -> Arrays:
    """The pictures of a batch.

    Args:
        trees: of each row the trees of its samples, leaves [m, ...]; they lie one after another.
        slots: of each row; those that are left are zero.

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
