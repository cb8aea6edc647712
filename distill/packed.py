"""Cached teacher states for packed batches: a cache has one row per sample, a packed row several samples."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from distill.cache import TeacherCache
from distill.records import at_answers, has_image_slots


def packed_rows(cache: TeacherCache, batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Reads the cached states of a packed host batch and packs them like its samples.

    Args:
        cache: an open cache.
        batch: from `data.packing.packed`; `index` [R, M] is -1 where a row has fewer than M samples, `slots` [R, M] is
            the number of images of each sample.

    Returns:
        `final` (or a name of `distill.top`) [R, M * A, Dt]; states of text towers [R, layers + 1, T, Dt]; states of
        image towers and `bridge/out` [R, slots, layers + 1, N, D].
    """
    index, segments = np.asarray(batch["index"]), np.asarray(batch["segment_ids"])
    (rows, samples), (_, length) = index.shape, segments.shape
    counts = np.array([[np.sum(row == sample + 1) for sample in range(samples)] for row in segments])
    # A batch with the largest lengths of single samples.
    shape = {"targets": (1, batch["targets"].shape[1] // samples), "input_ids": (1, counts.max())}
    like: dict[str, Any] = {name: np.zeros(size, np.int32) for name, size in shape.items()}
    like["images"] = {"valid": np.zeros((1, batch["slots"].max()), bool)}
    out = {}
    for name, states in cache.rows({**like, "index": np.maximum(index, 0).reshape(-1)}).items():
        states = states.reshape(rows, samples, *states.shape[1:])
        if at_answers(name):
            states = states.reshape(rows, -1, states.shape[-1])
        elif has_image_slots(name):
            states = _pack_images(states, batch["slots"], batch["images"]["valid"].shape[1])
        else:
            states = _pack_tokens(states, counts, length)
        out[name] = states
    return out


def _pack_images(states: np.ndarray, counts: np.ndarray, slots: int) -> np.ndarray:
    """Packs image states of samples [R, M, m, ...] to those of rows [R, slots, ...]."""
    out = np.zeros((states.shape[0], slots, *states.shape[3:]), states.dtype)
    for row, samples in enumerate(counts):
        for sample, (count, end) in enumerate(zip(samples, np.cumsum(samples), strict=True)):
            out[row, end - count : end] = states[row, sample, :count]
    return out


def _pack_tokens(states: np.ndarray, counts: np.ndarray, length: int) -> np.ndarray:
    """Packs text states of samples [R, M, layers + 1, N, D] to those of rows [R, layers + 1, length, D]."""
    out = np.zeros((states.shape[0], states.shape[2], length, states.shape[4]), states.dtype)
    for row, samples in enumerate(counts):
        for slot, (count, end) in enumerate(zip(samples, np.cumsum(samples), strict=True)):
            out[row, :, end - count : end] = states[row, slot, :, :count]
    return out


def layers_first(name: str, states: Array | np.ndarray) -> Array | np.ndarray:
    """Transposes cached states to the layout of collected states, [layers + 1, samples or rows, N, D].

    Args:
        name: name of the states.
        states: cached states, with samples or (from `packed_rows`) rows first.

    Returns:
        The states; those of `at_answers` are unchanged.
    """
    if at_answers(name):
        return states
    return jnp.swapaxes(states.reshape(-1, *states.shape[-3:]), 0, 1)
