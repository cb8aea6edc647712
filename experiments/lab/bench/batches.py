"""Random batches on the device, and a teacher with cached states for them."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import distill
from antgmm_jax.config import LMMConfig
from antgmm_jax.pure import Params, functional

_PIECE = 8  # batch size for building the cache


def device_arrays(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Copies the arrays of a batch that a train step reads to the device.

    Args:
        batch: from `random_batch`, possibly with states of the teacher.

    Returns:
        name -> array, without row numbers and prompts.
    """
    read = {name: value for name, value in batch.items() if name != "index" and not name.startswith("prompt/")}
    return jax.tree.map(jnp.asarray, read)


def first(batch: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """Returns the first rows of a batch."""
    return jax.tree.map(lambda value: value[:rows], dict(batch))


def cached_teacher(config: LMMConfig, params: Params, batch: Mapping[str, Any]) -> distill.Teacher:
    """Creates a teacher with its states for a batch cached in memory.

    Args:
        config: config of the teacher.
        params: parameters of the teacher.
        batch: from `random_batch`.

    Returns:
        The teacher; its `attach` accepts any rows of the batch.
    """
    pure, samples = functional(config), len(batch["index"])
    starts = range(0, samples, _PIECE)
    pieces = (jax.tree.map(lambda value, at=at: value[at : at + _PIECE], dict(batch)) for at in starts)
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "cache"
        distill.build_cache(pure, params, pieces, cache, samples=samples, like=first(batch, _PIECE), key="bench")
        return distill.cached(pure, params, distill.open_cache(cache, key="bench", in_memory=True))
