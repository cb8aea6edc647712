"""Several samples in one row of tokens, so that short ones cost no padding: which go together, and their arrays.

Only models without an encoder pack; `antgmm_jax.blocks.packing` says how they read such a batch.
"""

import math

import numpy as np
from jaxtyping import Int

from antgmm_jax.errors import AntgmmError
from data.batching import Batches, batches
from data.collate import IGNORE, Needs
from data.making import ASIS, Rows, Seen, placed
from data.record import Arrays

OPEN = 64
"""Rows that a sample may yet join: more fill rows hardly better, and take longer to look through."""


def pack(
    tokens: Int[np.ndarray, " N"], slots: Int[np.ndarray, " N"], width: int, *, seed: int
) -> Int[np.ndarray, "K M"]:
    """Puts samples into rows: in random order, each into the first of the open rows that has room for it.

    A row is given at most as many samples as the width divided by the mean length, rounded, and at most the picture
    slots that so many have on average: all rows have as many slots as the fullest, used or not, and a picture costs
    more than a few tokens of padding.

    Args:
        tokens: of each sample.
        slots: of each sample's pictures.
        width: tokens of a row.
        seed: of the order.

    Returns:
        Sample numbers of each row in the order that they lie in, M in the fullest, -1 behind the last of the others;
        every sample once.

    Raises:
        AntgmmError: a sample that is longer than a row.
    """
    if tokens.max() > width:
        raise AntgmmError(f"pack = {width} but a sample has {tokens.max()} tokens: raise pack")
    most = max(1, round(width / tokens.mean()))
    room = max(int(slots.max()), math.ceil(most * slots.mean()))
    rows: list[list[int]] = []
    # Tokens and slots left in the last rows; no tokens once a row has its M samples.
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


def packed(
    rows: Rows,
    table: Int[np.ndarray, "R M"],
    *,
    width: int,
    answer: int,
    slots: int,
    seen: Seen = ASIS,
    choices: np.ndarray | None = None,
) -> Arrays:
    """The batch of packed rows.

    Args:
        rows: encoded records of a model that reads prompt and answer in one.
        table: sample numbers of each row, -1 for none.
        width: tokens of a row.
        answer: columns of each sample's answer.
        slots: picture slots of a row.
        seen: how pictures are seen.
        choices: what chance decided of each sample, [R, M, ...], from `Seen.choices`.

    Returns:
        `input_ids`, `attention_mask`, `segment_ids` int32 [R, width]; `positions`, `targets` int32 [R, M * answer],
        those of the row's samples one after another; `images` and `vision_features` [R, slots, ...] in the order of the
        samples; `index` int32 [R, M], the sample numbers, and `slots` int32 [R, M], picture slots of each.
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
            found = rows.tokens(sample)
            prompt, said = found["prompt"], found["answer"]
            end = start + len(prompt) + len(said)
            out["input_ids"][row, start:end] = np.concatenate([prompt, said])
            out["segment_ids"][row, start:end] = place + 1
            out["targets"][row, place, : len(said)] = said
            out["positions"][row, place, : len(said)] = np.arange(len(said)) + start + len(prompt) - 1
            own.append(seen.images(rows, sample, choices[row, place]))
            out["slots"][row, place] = len(next(iter(own[-1].values()), ()))
            start = end
        trees.append(own)
    if not any(trees):  # a last batch may be filled up with rows without samples
        trees[0].append({name: leaf[:0] for name, leaf in seen.images(rows, 0, choices[0, 0]).items()})
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
    seen: Seen = ASIS,
    prefetch: int = 2,
    threads: int = 1,
) -> Batches:
    """Endless shuffled batches of packed rows; equal arguments give equal batches.

    Which samples share a row is drawn once; every epoch has its own order of rows, and each sample once: rows without
    samples make whole batches of them.

    Args:
        rows: encoded records of a model that reads prompt and answer in one.
        needs: of each.
        size: rows a batch.
        seed: seed of the rows and their order.
        width: tokens of a row.
        answer: columns of each sample's answer.
        own: the rows of a batch that this process makes.
        visits: samples that an epoch visits, as in `data.batching.batches`.
        seen: how pictures are seen.
        prefetch: as there.
        threads: as there.

    Returns:
        An iterator of what `packed` gives.

    Raises:
        AntgmmError: fewer rows than a batch needs, or a sample longer than a row.
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
