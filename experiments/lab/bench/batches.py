"""Random batches on the device, and a cached teacher of them."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import distill
from antgmm_jax.config import LMMConfig
from antgmm_jax.pure import Params, functional

_PIECE = 8  # rows that the teacher reads at a time while its states are cached


def device_arrays(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What a train step reads of a batch, on the device.

    Args:
        batch: from `random_batch`, perhaps with a teacher's states.

    Returns:
        Arrays by name, without row numbers and prompts.
    """
    read = {name: value for name, value in batch.items() if name != "index" and not name.startswith("prompt/")}
    return jax.tree.map(jnp.asarray, read)


def first(batch: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """The first rows of a batch."""
    return jax.tree.map(lambda value: value[:rows], dict(batch))


def cached_teacher(config: LMMConfig, params: Params, batch: Mapping[str, Any]) -> distill.Teacher:
    """A teacher whose states for a batch are in memory.

    Args:
        config: the teacher.
        params: its parameters.
        batch: from `random_batch`.

    Returns:
        The `Teacher`, whose `attach` takes any rows of the batch.
    """
    pure, samples = functional(config), len(batch["index"])
    starts = range(0, samples, _PIECE)
    pieces = (jax.tree.map(lambda value, at=at: value[at : at + _PIECE], dict(batch)) for at in starts)
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "cache"
        distill.build_cache(pure, params, pieces, cache, samples=samples, like=first(batch, _PIECE), key="bench")
        return distill.cached(pure, params, distill.open_cache(cache, key="bench", in_memory=True))
