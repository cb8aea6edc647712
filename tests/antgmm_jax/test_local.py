"""A stack with local layers, which have another mask and other positions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from antgmm_jax.blocks.block import Context
from antgmm_jax.blocks.rope import rope
from antgmm_jax.blocks.stack import Stack, unrolled
from antgmm_jax.config import StackConfig, Tower
from tests.modules import split

B, T, LOCAL = 2, 6, (0, 2, 3, 9)
CONFIG = StackConfig(
    layers=5, embed=8, heads=2, head_dim=4, mlp=12, act="silu", positions="rope", norm="rms", local_layers=LOCAL
)
AT = jnp.broadcast_to(jnp.arange(T)[None], (B, T))


@pytest.fixture(scope="module")
def stack() -> Stack:
    """A stack with ten times its initial weights, so that the mask matters."""
    graph, leaves = split(Stack(Tower("text", CONFIG, "", "text/embed", "text", "", "")))
    return nnx.merge(graph, jax.tree.map(lambda leaf: 10 * leaf, leaves))


def contexts() -> Context:
    """Contexts: whole rows for global layers; two neighbours and other wavelengths for local layers."""
    whole = jnp.ones((B, 1, 1, T), bool)
    near = jnp.asarray(np.abs(np.arange(T)[:, None] - np.arange(T)[None]) < 2)[None, None]
    local = Context(mask=near, positions=rope(AT, 4, 50.0))
    return Context(mask=whole, positions=rope(AT, 4, 1e4), valid=jnp.ones((B, T), bool), local=local)


def test_each_layer_uses_the_context_of_its_kind(stack):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(B, T, 8)), jnp.float32)
    both, expected = contexts(), x
    assert both.local is not None
    for layer, (block, _) in enumerate(stack.unstack()):
        context = both.local if layer in LOCAL else both._replace(local=None)
        expected = block(expected, context, {})[0]
    got, kept = jax.jit(lambda x: stack(x, both, {}, ("text/mlp",), taps=(1,)))(x)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-4)
    assert kept["text/mlp"].shape == (5, B, 12)
    alike = stack(x, both._replace(local=None), {})[0]
    assert np.abs(alike - expected).max() > 0.1


def test_unrolled_layers_equal_the_scan(stack):
    x = jnp.asarray(np.random.default_rng(1).normal(size=(B, T, 8)), jnp.float32)
    empty = jnp.zeros((B, 2, T, 4))
    got, _ = unrolled(stack.unstack(), x, contexts(), [(empty, empty)] * 5, [None] * 5, 0)
    np.testing.assert_allclose(got, stack(x, contexts(), {})[0], rtol=1e-5, atol=1e-4)


def test_indices_beyond_the_last_layer_are_ignored():
    assert CONFIG.is_local == (True, False, True, True, False)
