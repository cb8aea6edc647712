"""Programs read the weights of a stack where they are: a copy of all of them is as large as the model."""

import jax
import pytest

from antgmm_jax.axes import resize, sizes
from antgmm_jax.families import FAMILIES
from antgmm_jax.parallel.sharding import make_mesh
from antgmm_jax.presets import PRESETS
from antgmm_jax.pure import abstract, functional
from distill import LossConfig, make_loss
from experiments.lab.planning.shapes import batch_shapes, image_tokens

TINY = [next(name for name in one.presets if name.endswith("-tiny")) for one in FAMILIES.values()]
QUICK = ("qwen3-vl-tiny", "qwen2.5-vl-tiny")
"""Those with the most kinds of layers."""


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.long) for n in TINY])
def test_a_gradient_copies_no_weights(name):
    small = PRESETS[name]
    # Wide enough that the weights of the stacks are most of the model, and more than the activations of a row.
    config = resize(small, {axis: 16 * size for axis, size in sizes(small).items() if axis.endswith("/mlp")})
    loss, params = make_loss(functional(config, "full"), LossConfig(hard=1.0)), abstract(config)
    with jax.set_mesh(make_mesh(data=1, devices=jax.devices()[:1])):
        batch = dict(batch_shapes(config, 1, image_tokens(config, None) + 16, 4))
        grad = jax.jit(jax.grad(lambda params, batch: loss(params, {}, batch, {})[0]))
        analysis = grad.lower(params, batch).compile().memory_analysis()
    assert analysis is not None
    assert analysis.temp_size_in_bytes < 0.5 * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
