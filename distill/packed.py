"""Cached targets of packed batches: a cache has a row for each sample, a packed row has several samples."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from distill.cache import TeacherCache, of_pictures


def packed_rows(cache: TeacherCache, batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The cached rows of a packed host batch, laid as the batch lays its samples.

    Args:
        cache: an opened cache.
        batch: from `data.packing.packed`; `index` [R, M] has -1 where a row has fewer samples, `slots` [R, M] says how
            many pictures each has.

    Returns:
        {name: row first}: `final` [R, M * A, Dt]; states of text [R, layers + 1, T, Dt]; those of pictures and
        `bridge/out` [R, slots, layers + 1, N, D].
    """
    index, segments = np.asarray(batch["index"]), np.asarray(batch["segment_ids"])
    (rows, samples), (_, length) = index.shape, segments.shape
    counts = np.array([[np.sum(line == sample + 1) for sample in range(samples)] for line in segments])
    # What a single sample's batch would look like; none has more tokens than the longest, or more pictures.
    shape = {"positions": (1, batch["positions"].shape[1] // samples), "input_ids": (1, counts.max())}
    like: dict[str, Any] = {name: np.zeros(size, np.int32) for name, size in shape.items()}
    like["images"] = {"valid": np.zeros((1, batch["slots"].max()), bool)}
    out = {}
    for name, found in cache.rows({**like, "index": np.maximum(index, 0).reshape(-1)}).items():
        found = found.reshape(rows, samples, *found.shape[1:])
        if name == "final":
            found = found.reshape(rows, -1, found.shape[-1])
        elif of_pictures(name):
            found = _one_by_one(found, batch["slots"], batch["images"]["valid"].shape[1])
        else:
            found = _side_by_side(found, counts, length)
        out[name] = found
    return out


def _one_by_one(found: np.ndarray, counts: np.ndarray, slots: int) -> np.ndarray:
    """States [R, M, m, ...] of samples' pictures as those of the rows that hold them, [R, slots, ...]."""
    out = np.zeros((found.shape[0], slots, *found.shape[3:]), found.dtype)
    for row, samples in enumerate(counts):
        for sample, (count, end) in enumerate(zip(samples, np.cumsum(samples), strict=True)):
            out[row, end - count : end] = found[row, sample, :count]
    return out


def _side_by_side(found: np.ndarray, counts: np.ndarray, length: int) -> np.ndarray:
    """States [R, M, layers + 1, N, D] of samples as those of the rows that hold them, [R, layers + 1, length, D]."""
    out = np.zeros((found.shape[0], found.shape[2], length, found.shape[4]), found.dtype)
    for row, samples in enumerate(counts):
        for slot, (count, end) in enumerate(zip(samples, np.cumsum(samples), strict=True)):
            out[row, :, end - count : end] = found[row, slot, :, :count]
    return out


def layers_first(name: str, states: Array) -> Array:
    """Cached states of a batch as a model collects them, [layers + 1, samples or rows, N, D].

    Args:
        name: under which they are cached.
        states: sample first, or row first as `packed_rows` gives them.

    Returns:
        The states; `final` as it is.
    """
    if name == "final":
        return states
    return jnp.swapaxes(states.reshape(-1, *states.shape[-3:]), 0, 1)
