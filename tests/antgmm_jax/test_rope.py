"""The form of the rotary product for TPUs equals the usual one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from antgmm_jax.blocks.rope import rope, rotate, rotate_by_product


@pytest.mark.parametrize("width", [4, 10, 64])
def test_halves_that_a_product_swaps_give_the_same_rotation(width):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, 5, 3, width)), jnp.bfloat16)
    by = rope(jnp.asarray(rng.integers(0, 900, (2, 5))), width, 1e4)
    np.testing.assert_array_equal(rotate_by_product(x, by), rotate(x, by))
    slope = jnp.asarray(rng.standard_normal(x.shape), jnp.bfloat16)
    here, there = (
        jax.grad(lambda x, turn=turn: jnp.sum((turn(x, by) * slope).astype(jnp.float32)))(x)
        for turn in (rotate_by_product, rotate)
    )
    # Both round to bfloat16, one of them twice.
    np.testing.assert_allclose(here.astype(jnp.float32), there.astype(jnp.float32), atol=2**-6)
