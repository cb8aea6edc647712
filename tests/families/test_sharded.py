"""A model sharded over eight devices gives the logits and gradients of one device."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, get_mesh

from antgmm_jax.decoding import forced_logits
from antgmm_jax.io.placed import on_devices
from antgmm_jax.parallel.processes import gather
from antgmm_jax.parallel.sharding import make_mesh, shard_rows, spec
from antgmm_jax.pure import functional
from tests.families.cases import PICTURES, WORDS, batch, close, counted


@pytest.fixture
def mesh():
    with jax.set_mesh(make_mesh(data=2, fsdp=2, tensor=2)) as mesh:
        yield mesh


def computed(case):
    """Returns placed parameters, logits, and the gradient of the logits' weighted sum."""
    config, arrays = case.config, batch(case.config)
    params, there = on_devices(config, case.params, "float32"), shard_rows(arrays)
    weights = np.random.default_rng(0).normal(size=(*counted(arrays).shape, config.language.vocab)).astype(np.float32)
    weights[~counted(arrays)] = 0

    def weighted(params, batch):
        logits = functional(config).apply(params, batch)["logits"]
        return (logits * weights).sum(), logits

    gradient, logits = gather(jax.jit(jax.grad(weighted, has_aux=True))(params, there))
    return params, np.asarray(logits)[counted(arrays)], gradient


@pytest.mark.long
def test_a_sharded_model_equals_the_whole_one(first, mesh):
    params, logits, gradient = computed(first)

    def lies(leaf, names) -> bool:
        return leaf.sharding.is_equivalent_to(NamedSharding(get_mesh(), spec(names, leaf.shape)), leaf.ndim)

    assert jax.tree.all(jax.tree.map(lies, params, functional(first.config).axes))
    # Kernels of heads or hidden units by widths: each device holds a quarter.
    assert any(4 * leaf.addressable_shards[0].data.size == leaf.size for leaf in jax.tree.leaves(params))
    with jax.set_mesh(None):
        _, expected, slope = computed(first)
    # Sums over devices have another order than sums on one device.
    close(logits, expected)
    for mine, theirs in zip(jax.tree.leaves(gradient), jax.tree.leaves(slope), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5 * max(1.0, float(np.abs(theirs).max())))


@pytest.mark.long
def test_a_sharded_model_decodes_as_the_whole_one(first, mesh):
    """Layers keep their weights split, and exchange rows."""
    config, arrays = first.config, batch(first.config, pad="left")
    prompt = {name: leaf for name, leaf in arrays.items() if name not in ("labels", "decoder_input_ids")}
    answers = np.random.default_rng(0).integers(*WORDS, (len(PICTURES), 5)).astype(np.int32)

    def decoded():
        params = on_devices(config, first.params, "float32")
        return np.asarray(gather(forced_logits(config, params, shard_rows(prompt), shard_rows({"": answers})[""])))

    mine = decoded()
    with jax.set_mesh(None):
        close(mine, decoded())
