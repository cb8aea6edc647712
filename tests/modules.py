"""Modules with parameters, for tests of one block or one tower."""

from typing import Any

import jax
from flax import nnx

from antgmm_jax.blocks.parameters import drawn


def split(module: nnx.Module) -> tuple[Any, nnx.State]:
    """Splits a module into its graph and initial parameters."""
    graph, state = nnx.split(module)
    return graph, drawn(state, jax.random.key(0))
