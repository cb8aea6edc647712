"""Linear maps with a custom backward pass have the value and the gradients of an einsum."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from antgmm_jax.blocks.layers import linear

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
