"""What a device reaches: its rates of matrix products and of copies, measured, of which all else is told as a share."""

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
"""Name -> dtype of the matrices and precision of their product. JAX's default for float32 is less than float32 where
the device has faster units: TF32 on an NVIDIA GPU, bfloat16 on a TPU."""


def matmul_rate(kind: str, sides: Sequence[int], rounds: int) -> dict[str, Any]:
    """The rate of products of square matrices.

    Args:
        kind: of `PRODUCTS`.
        sides: of the matrices.
        rounds: rounds that are timed.

    Returns:
        FLOP/s as `median`, `low` and `high` of the best size, its `side`, and those of all `sides`.
    """
    dtype, precision = PRODUCTS[kind]
    product = jax.jit(partial(jnp.dot, precision=precision))
    found = {}
    for side in sides:
        # Random numbers: matrices of ones toggle fewer bits, and a GPU then draws less power and clocks higher.
        a, b = (jax.random.normal(key, (side, side), dtype) for key in jax.random.split(jax.random.key(0)))
        found[side] = spread(2 * side**3 / dispatched(partial(product, a, b), rounds))
    best = max(found, key=lambda side: found[side]["median"])
    return {**found[best], "side": best, "sides": {str(side): rate for side, rate in found.items()}}


def copy_rate(size: int, rounds: int) -> dict[str, Any]:
    """The rate at which memory is read and written, as STREAM counts it (https://www.cs.virginia.edu/stream).

    Args:
        size: bytes of an array, more than the caches hold.
        rounds: rounds that are timed.

    Returns:
        bytes/s as `median`, `low` and `high` of the better one, its name under `kernel`, and those of both `kernels`:
        `copy`, a = b, and `triad`, a = b + s c.
    """
    b, c = (jax.random.normal(key, (size // 4,), jnp.float32) for key in jax.random.split(jax.random.key(0)))
    scalar = jnp.float32(3.0)
    kernels = {
        "copy": (2, partial(jax.jit(jnp.copy), b)),
        "triad": (3, partial(jax.jit(lambda b, c, s: b + s * c), b, c, scalar)),
    }
    found = {
        name: spread(arrays * b.nbytes / np.asarray(dispatched(work, rounds)))
        for name, (arrays, work) in kernels.items()
    }
    best = max(found, key=lambda name: found[name]["median"])
    return {**found[best], "kernel": best, "bytes": b.nbytes, "kernels": found}
