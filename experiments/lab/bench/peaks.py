"""Measured peak rates of a device: matrix products and memory copies."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.lab.bench.timing import dispatched, spread

PRODUCTS = {
    "bfloat16": (jnp.bfloat16, jax.lax.Precision.DEFAULT),
    "float32": (jnp.float32, jax.lax.Precision.DEFAULT),
    "float32_highest": (jnp.float32, jax.lax.Precision.HIGHEST),
}
"""Name -> dtype of the matrices and precision of their product. JAX's default precision for float32 is TF32 on NVIDIA
GPUs and bfloat16 on TPUs."""


def matmul_rate(kind: str, sides: Sequence[int], rounds: int) -> dict[str, Any]:
    """Measures the rate of products of square matrices.

    Args:
        kind: key of `PRODUCTS`.
        sides: sides of the matrices.
        rounds: measured rounds.

    Returns:
        FLOP/s as `median`, `low` and `high` of the best size, its `side`, and the rates of all `sides`.
    """
    dtype, precision = PRODUCTS[kind]
    product = jax.jit(partial(jnp.dot, precision=precision))
    rates = {}
    for side in sides:
        # Random numbers: with ones, fewer bits toggle, and a GPU uses less power and a higher clock rate.
        a, b = (jax.random.normal(key, (side, side), dtype) for key in jax.random.split(jax.random.key(0)))
        rates[side] = spread(2 * side**3 / dispatched(partial(product, a, b), rounds))
    best = max(rates, key=lambda side: rates[side]["median"])
    return {**rates[best], "side": best, "sides": {str(side): rate for side, rate in rates.items()}}


def copy_rate(size: int, rounds: int) -> dict[str, Any]:
    """Measures memory bandwidth like STREAM (https://www.cs.virginia.edu/stream).

    Args:
        size: bytes of an array; it must be larger than the caches.
        rounds: measured rounds.

    Returns:
        bytes/s as `median`, `low` and `high` of the faster kernel, its name as `kernel`, and the rates of both
        `kernels`: `copy`, a = b, and `triad`, a = b + s c.
    """
    b, c = (jax.random.normal(key, (size // 4,), jnp.float32) for key in jax.random.split(jax.random.key(0)))
    scalar = jnp.float32(3.0)
    kernels = {
        "copy": (2, partial(jax.jit(jnp.copy), b)),
        "triad": (3, partial(jax.jit(lambda b, c, s: b + s * c), b, c, scalar)),
    }
    rates = {
        name: spread(arrays * b.nbytes / np.asarray(dispatched(work, rounds)))
        for name, (arrays, work) in kernels.items()
    }
    best = max(rates, key=lambda name: rates[name]["median"])
    return {**rates[best], "kernel": best, "bytes": b.nbytes, "kernels": rates}
