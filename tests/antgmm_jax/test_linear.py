"""Linear maps with a custom backward pass have the value and the gradients of an einsum."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from antgmm_jax.blocks.layers import linear
from antgmm_jax.blocks.low_rank import LowRank

SHAPES = {
    "b t d, d h e -> b t h e": ((2, 3, 4), (4, 2, 5), 1),
    "b t h e, h e d -> b t d": ((2, 3, 2, 5), (2, 5, 4), 2),
    "d, d m -> m": ((4,), (4, 3), 1),
}


@pytest.mark.parametrize("pattern", SHAPES)
def test_value_and_gradients_are_those_of_an_einsum(pattern):
    left, right, inputs = SHAPES[pattern]
    rng = np.random.default_rng(0)
    x, kernel = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in (left, right))
    expected = jnp.einsum(pattern.replace(" ", ""), x, kernel)
    weight = rng.normal(size=expected.shape).astype(np.float32)
    bias = jnp.asarray(rng.normal(size=right[inputs:]), jnp.float32)

    def value(x, kernel, bias):
        return (weight * linear(x, kernel, bias, inputs=inputs)).sum()

    def reference(x, kernel, bias):
        with jax.numpy_rank_promotion("allow"):
            return (weight * (jnp.einsum(pattern.replace(" ", ""), x, kernel) + bias)).sum()

    np.testing.assert_allclose(linear(x, kernel, None, inputs=inputs), expected, rtol=1e-5, atol=1e-5)
    gradients, desired = (jax.jit(jax.grad(f, argnums=(0, 1, 2)))(x, kernel, bias) for f in (value, reference))
    for one, other in zip(gradients, desired, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rank", [None, 2])
def test_16_bit_products_with_a_float32_result_are_not_rounded(rank):
    rng = np.random.default_rng(0)
    x, kernel, a, b = (
        jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in ((3, 64), (64, 5), (64, 2), (2, 5))
    )

    def logits(x, kernel):
        return linear(x, kernel if rank is None else LowRank(kernel, a, b), None, dtype=jnp.float32)

    out, back = jax.vjp(logits, x, kernel)
    wide, narrow = np.float32(x), np.float32(kernel)
    expected = wide @ narrow
    if rank is not None:
        # The factors' product between is one of the adapter, which is rounded.
        expected = expected + np.float32(linear(x, a, None)) @ np.float32(b)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
    dx, dkernel = back(jnp.ones_like(out))
    assert dx.dtype == dkernel.dtype == jnp.bfloat16
    of_x = np.ones((3, 5)) @ (narrow.T if rank is None else (narrow + np.float32(a) @ np.float32(b)).T)
    np.testing.assert_allclose(np.float32(dx), of_x, rtol=0.03, atol=0.1)  # bfloat16 has 8 bits
    np.testing.assert_allclose(np.float32(dkernel), wide.T @ np.ones((3, 5)), rtol=0.01, atol=0.05)
