"""Packing of several short samples into one row of tokens, to avoid padding; for decoder-only models.

`antgmm_jax.blocks.packing` describes the format of a packed batch.
"""

import math

import numpy as np
from jaxtyping import Int

from antgmm_jax.blocks.tokens import IGNORE
from antgmm_jax.errors import AntgmmError
from data.batching import Batches, batches
from data.collate import Needs, trained_tokens
from data.making import UNCHANGED, ImageOptions, Rows, placed
from data.record import Arrays

OPEN = 64
"""Number of open rows to search for free space; more fill rows hardly better and take longer to search."""


def check_lengths(tokens: Int[np.ndarray, " N"], width: int) -> None:
    """Checks that each sample fits a packed row.

    Args:
        tokens: tokens of each sample.
        width: tokens of a row.

    Raises:
        AntgmmError: a sample is longer than a row.
    """
    if tokens.max() > width:
        raise AntgmmError(f"pack = {width}, but a sample has {tokens.max()} tokens: increase pack")


def pack(
    tokens: Int[np.ndarray, " N"], slots: Int[np.ndarray, " N"], width: int, *, seed: int
) -> Int[np.ndarray, "K M"]:
    """Assigns samples to rows: in random order, each to the first open row with enough space.

    A row gets at most round(width / mean length) samples and at most the image slots that so many samples have on
    average: every row is padded to the largest number of slots, and a slot costs more than a few tokens.

    Args:
        tokens: tokens of each sample.
        slots: image slots of each sample.
        width: tokens per row.
        seed: seed of the order.

    Returns:
        Sample numbers of each row, filled up with -1; every sample occurs once.

    Raises:
        AntgmmError: a sample is longer than a row.
    """
    check_lengths(tokens, width)
    most = max(1, round(width / tokens.mean()))
    room = max(int(slots.max()), math.ceil(most * slots.mean()))
    rows: list[list[int]] = []
    # Free tokens and slots of the open rows; 0 once a row has its maximum number of samples.
    free = np.zeros((0, 2), int)
    for sample in np.random.Generator(np.random.PCG64(seed)).permutation(len(tokens)):
        wanted = (tokens[sample], slots[sample])
        fits = np.flatnonzero((free >= wanted).all(axis=1))
        if len(fits) == 0:
            rows.append([])
            free = np.concatenate([free, [(width, room)]])[-OPEN:]
        place = fits[0] if len(fits) else len(free) - 1
        row = rows[place - len(free)]
        row.append(int(sample))
        free[place] = 0 if len(row) == most else free[place] - wanted
    most = max(map(len, rows))
    return np.array([row + [-1] * (most - len(row)) for row in rows])


def row_count(
    tokens: Int[np.ndarray, " N"], slots: Int[np.ndarray, " N"], width: int, *, seed: int, enough: int
) -> int:
    """Returns the number of rows that samples are packed to, or a lower bound if that is enough.

    Packing 600 000 samples takes half a minute, their tokens are summed in a millisecond.

    Args:
        tokens: tokens of each sample.
        slots: image slots of each sample.
        width: tokens per row.
        seed: seed of the order.
        enough: number of rows from which a lower bound is returned.

    Returns:
        The number of rows of `pack`, or a smaller number of at least `enough`.
    """
    least = -(-int(tokens.sum()) // width)
    return least if least >= enough else len(pack(tokens, slots, width, seed=seed))


def packed(
    rows: Rows,
    table: Int[np.ndarray, "R M"],
    *,
    width: int,
    answer: int,
    slots: int,
    seen: ImageOptions = UNCHANGED,
    choices: np.ndarray | None = None,
) -> Arrays:
    """Creates a batch of packed rows.

    Args:
        rows: encoded records, for a decoder-only model.
        table: sample numbers of each row, -1 for none.
        width: tokens per row.
        answer: columns per sample for tokens of its answers.
        slots: image slots per row.
        seen: image options.
        choices: random choices of the samples, [R, M, ...], from `ImageOptions.choices`.

    Returns:
        `input_ids`, `attention_mask`, `segment_ids` int32 [R, width]; `positions`, `targets` int32 [R, M * answer], for
        one sample after another; `images` and `vision_features` [R, slots, ...] in the order of the samples; `index`
        int32 [R, M], the sample numbers; `slots` int32 [R, M], image slots per sample.
    """
    count, most = table.shape
    choices = np.zeros((count, most, 2), int) if choices is None else choices
    out: Arrays = {name: np.zeros((count, width), np.int32) for name in ("input_ids", "attention_mask", "segment_ids")}
    out["positions"] = np.zeros((count, most, answer), np.int32)
    out["targets"] = np.full((count, most, answer), IGNORE, np.int32)
    out["slots"] = np.zeros((count, most), np.int32)
    trees: list[list[Arrays]] = []
    for row, samples in enumerate(table):
        start, own = 0, []
        for place, sample in enumerate(samples[samples >= 0].tolist()):
            encoded = rows.tokens(sample)
            ids, trained = np.concatenate([encoded["prompt"], encoded["answer"]]), trained_tokens(encoded)
            end = start + len(ids)
            out["input_ids"][row, start:end] = ids
            out["segment_ids"][row, start:end] = place + 1
            out["targets"][row, place, : len(trained)] = ids[trained]
            out["positions"][row, place, : len(trained)] = trained + start - 1
            own.append(seen.images(rows, sample, encoded, choices[row, place]))
            out["slots"][row, place] = len(next(iter(own[-1].values()), ()))
            start = end
        trees.append(own)
    if not any(trees):  # the last batch may be filled up with empty rows
        none = seen.images(rows, 0, rows.tokens(0), choices[0, 0])
        trees[0].append({name: leaf[:0] for name, leaf in none.items()})
    out["attention_mask"][:] = out["segment_ids"] > 0
    flat = {name: out[name].reshape(count, most * answer) for name in ("positions", "targets")}
    return {**out, **flat, **placed(trees, slots), "index": table.astype(np.int32)}


def packed_batches(
    rows: Rows,
    needs: Needs,
    *,
    size: int,
    seed: int,
    width: int,
    answer: int,
    own: np.ndarray,
    visits: np.ndarray | None = None,
    seen: ImageOptions = UNCHANGED,
    prefetch: int = 2,
    threads: int = 1,
) -> Batches:
    """Returns an endless iterator of shuffled batches of packed rows; equal arguments give equal batches.

    Samples are assigned to rows once; every epoch has a new order of rows and visits each sample once. Empty rows
    complete the last batch.

    Args:
        rows: encoded records, for a decoder-only model.
        needs: columns and slots that each record needs.
        size: rows per batch.
        seed: seed of the assignment and the order.
        width: tokens per row.
        answer: columns per sample for tokens of its answers.
        own: rows of a batch that this process creates.
        visits: sample numbers that an epoch visits, see `data.batching.batches`.
        seen: image options.
        prefetch: see `data.batching.batches`.
        threads: see `data.batching.batches`.

    Returns:
        Iterator of the batches of `packed`.

    Raises:
        AntgmmError: there are fewer rows than `size`, or a sample is longer than a row.
    """
    chosen = np.arange(len(rows)) if visits is None else visits
    table = pack(needs.text[chosen], needs.slots[chosen], width, seed=seed)
    table = np.where(table < 0, -1, chosen[table])
    if len(table) < size:
        raise AntgmmError(f"a batch of {size} rows of {width} tokens needs more samples: the data fills {len(table)}")
    slots = max(1, int(np.where(table < 0, 0, needs.slots[table]).sum(axis=1).max()))
    table = np.pad(table, ((0, -len(table) % size), (0, 0)), constant_values=-1)

    def make(places: np.ndarray, rng: np.random.Generator) -> Arrays:
        choices = seen.choices(rng, (len(places), table.shape[1]))[own]
        shape = {"width": width, "answer": answer, "slots": slots}
        return packed(rows, table[places[own]], **shape, seen=seen, choices=choices)

    return batches(make, np.zeros(len(table), int), size=size, seed=seed, prefetch=prefetch, threads=threads)
