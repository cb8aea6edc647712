"""Several samples in one row of tokens, so that short ones cost no padding: which go together, and their arrays.

Only models without an encoder pack; `antgmm_jax.packing` says how they read such a batch.
"""

from collections.abc import Callable
from typing import Any

import grain
import numpy as np
from jaxtyping import Int

from antgmm_jax.errors import AntgmmError
from antgmm_jax.sharding import own_rows
from data.batches import Batches, Plan, lengths
from data.encoding import IGNORE
from data.record import Arrays
from data.shifting import seen

OPEN = 64
"""Rows that a sample may yet join: more fill rows hardly better, and take longer to look through."""
_PICTURES = ("images", "views", "vision_features")


def pack(found: Int[np.ndarray, " N"], width: int, *, seed: int) -> Int[np.ndarray, "K M"]:
    """Puts samples into rows: in random order, each into the first of the open rows that has room for it.

    A row is given at most as many samples as the width divided by the mean length, rounded: all rows have as many
    pictures as the fullest, used or not, and a picture costs more than a few tokens of padding.

    Args:
        found: tokens of each sample.
        width: tokens of a row.
        seed: of the order.

    Returns:
        Sample numbers of each row in the order that they lie in, M in the fullest, -1 behind the last of the others;
        every sample once.

    Raises:
        AntgmmError: a sample that is longer than a row.
    """
    if found.max() > width:
        raise AntgmmError(f"pack = {width} but a sample has {found.max()} tokens: raise pack")
    most = max(1, round(width / found.mean()))
    rows: list[list[int]] = []
    free = np.zeros(0, int)  # of the last rows; 0 once a row has its M samples
    for sample in np.random.Generator(np.random.PCG64(seed)).permutation(len(found)):
        fits = np.flatnonzero(free >= found[sample])
        if len(fits) == 0:
            rows.append([])
            free = np.append(free, width)[-OPEN:]
        place = fits[0] if len(fits) else len(free) - 1
        row = rows[place - len(free)]
        row.append(int(sample))
        free[place] = 0 if len(row) == most else free[place] - found[sample]
    slots = max(map(len, rows))
    return np.array([row + [-1] * (slots - len(row)) for row in rows])


def packed(arrays: Arrays, rows: Int[np.ndarray, "R M"], width: int) -> Arrays:
    """The arrays of packed rows.

    Args:
        arrays: from `data.encoding.encode` (LLaVA), or with `views` of image features in the place of `images` or
            beside them.
        rows: sample numbers of each row, -1 for none.
        width: tokens of a row.

    Returns:
        `input_ids`, `attention_mask`, `segment_ids` int32 [R, width]; `positions`, `targets` int32 [R, M * A], those of
        the row's samples one after another (A: the answers' width); `images`, `views` [R, M, ...];
        `index` int32 [R, M], the sample numbers.
    """
    count, slots = rows.shape
    length, answer = lengths(arrays), arrays["targets"].shape[1]
    out: Arrays = {name: np.zeros((count, width), np.int32) for name in ("input_ids", "attention_mask", "segment_ids")}
    out["positions"] = np.zeros((count, slots, answer), np.int32)
    out["targets"] = np.full((count, slots, answer), IGNORE, np.int32)
    pictures = [name for name in _PICTURES if name in arrays]
    for name in pictures:
        out[name] = np.zeros((count, slots, *arrays[name].shape[1:]), arrays[name].dtype)
    for row, samples in enumerate(rows):
        start = 0
        for slot, sample in enumerate(samples[samples >= 0]):
            end = start + length[sample]
            out["input_ids"][row, start:end] = arrays["input_ids"][sample, : end - start]
            out["segment_ids"][row, start:end] = slot + 1
            out["targets"][row, slot] = arrays["targets"][sample]
            valid = arrays["targets"][sample] != IGNORE
            out["positions"][row, slot] = np.where(valid, arrays["positions"][sample] + start, 0)
            for name in pictures:
                out[name][row, slot] = arrays[name][sample]
            start = end
    out["attention_mask"][:] = out["segment_ids"] > 0
    flat = {name: out[name].reshape(count, slots * answer) for name in ("positions", "targets")}
    return {**out, **flat, "index": rows.astype(np.int32)}


def packed_batches(
    arrays: Arrays,
    *,
    size: int,
    seed: int,
    width: int,
    rows: np.ndarray | None = None,
    shift: int = 0,
    finish: Callable[[Arrays], dict[str, Any]] = dict,
    prefetch: int = 2,
) -> Batches:
    """Endless shuffled batches of packed rows; equal arguments give equal batches.

    Which samples share a row is drawn once; every epoch has its own order of rows, and each sample once: rows without
    samples make whole batches of them.

    Args:
        arrays: name -> array with N rows, from `data.encoding.encode` (LLaVA).
        size: rows a batch.
        seed: seed of the rows and their order.
        width: tokens of a row.
        rows: as in `data.batches.batches`, samples.
        shift: as there.
        finish: as in `data.batches.batches`; it is given pictures [R, M, ...].
        prefetch: batches made ahead of time.

    Returns:
        An iterator of what `packed` gives, finished.

    Raises:
        AntgmmError: fewer rows than a batch needs, a sample longer than a row, or a batch that does not divide by a
            mesh's devices.
    """
    found = lengths(arrays)
    chosen = np.arange(len(found)) if rows is None else rows
    table = pack(found[chosen], width, seed=seed)
    table = np.where(table < 0, -1, chosen[table])
    if len(table) < size:
        raise AntgmmError(f"a batch of {size} rows of {width} tokens needs more samples: the data fills {len(table)}")
    table = np.pad(table, ((0, -len(table) % size), (0, 0)), constant_values=-1)
    own = own_rows(size)

    def make(places: np.ndarray, rng: np.random.Generator) -> Arrays:
        batch = packed(arrays, table[places[own]], width)
        batch = seen(batch, rng, shift=shift, shape=(len(places), table.shape[1]), own=own)
        made = finish(batch)
        if isinstance(made.get("images"), dict):
            # Slots of a row that no sample fills hold no picture.
            made["images"] = {**made["images"], "valid": table[places[own]] >= 0}
        return made

    order = grain.MapDataset.source(Plan(np.zeros(len(table), int), size, seed))
    return Batches(order.random_map(make, seed=seed), prefetch)
