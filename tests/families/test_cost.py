"""The analytic cost equals XLA's count of the compiled program and the number of parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from antgmm_jax.axes import resize, sizes
from antgmm_jax.config import towers
from antgmm_jax.pure import abstract, functional
from pruning.costs import cost, forward_flops, kernels, parameters
from tests.families.cases import batch

BATCH, LENGTH, ANSWER, WIDTH = 2, 48, 16, 256


@pytest.fixture(scope="module")
def wide(first):
    """A wide config with one layer per stack, because XLA counts a scan's body once. In wide models norms, softmax and
    activations, which only XLA counts, are a few percent. These models are compiled and never run."""
    stacks = {name: tower.stack for name, tower in towers(first.config).items()}

    def size(axis):
        tower, local = axis.split("/")
        if local.endswith("heads"):
            return WIDTH // (stacks[tower].head_dim * stacks[tower].q_per_kv)
        return {"layers": 1, "embed": WIDTH}.get(local, 4 * WIDTH)

    return resize(first.config, {axis: size(axis) for axis in sizes(first.config)})


def described(config):
    """Returns the shapes of a batch with one picture of the usual size per row."""

    def ints(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    images = {name: jax.ShapeDtypeStruct((BATCH, config.slots, *leaf.shape[2:]), leaf.dtype)
              for name, leaf in batch(config)["images"].items()}  # fmt: skip
    made = {"images": images, "input_ids": ints(BATCH, LENGTH), "attention_mask": ints(BATCH, LENGTH)}
    return made | ({"decoder_input_ids": ints(BATCH, ANSWER)} if config.encoder_decoder else {})


def xla_flops(function, *arguments) -> float:
    analysis = jax.jit(function).lower(*arguments).compile().cost_analysis()
    assert analysis is not None
    return analysis["flops"]


def test_forward_flops_equal_the_compiled_programs(wide):
    model = functional(wide)
    compiled = xla_flops(lambda p, b: model.apply(p, b)["logits"], abstract(wide), described(wide))
    assert sum(forward_flops(wide, BATCH, LENGTH, ANSWER).values()) == pytest.approx(compiled, rel=0.05)


def test_flops_of_phases_equal_the_compiled_engines(wide):
    model, params, arrays = functional(wide), abstract(wide), described(wide)
    flops = cost(wide, BATCH, LENGTH, ANSWER).flops

    def prefill(params, batch):
        return nnx.merge(model.graph, nnx.State(params)).prefill(batch, ANSWER)

    def step(params, ids, state, valid):
        language = nnx.merge(model.graph, nnx.State(params)).language
        return language.step(ids, state, valid, language.decoder.unstack())

    # The engine runs the bridge's last maps in the prompt phase, not in the image phase.
    last = 2 * BATCH * wide.slots * wide.tokens["bridge/out"] * kernels(wide)["bridge", "bridge/out"]
    vision = xla_flops(model.features, params, arrays["images"])
    assert sum(flops["vision"].values()) - last == pytest.approx(vision, rel=0.05)
    both = sum(flops["vision"].values()) + sum(flops["prefill"].values())
    assert both == pytest.approx(xla_flops(prefill, params, arrays), rel=0.05)
    state, valid = jax.eval_shape(prefill, params, arrays)
    once = xla_flops(step, params, jax.ShapeDtypeStruct((BATCH,), jnp.int32), state, valid)
    assert sum(flops["decode"].values()) == pytest.approx((ANSWER - 1) * once, rel=0.05)
    caches = [leaf for leaf in jax.tree.leaves((state.caches, state.cross_caches)) if leaf is not None]
    assert cost(wide, BATCH, LENGTH, ANSWER, itemsize=4).kv_cache == sum(leaf.size * 4 for leaf in caches)


def test_parameters_are_counted_exactly(case):
    counts = parameters(case.config)
    assert sum(counts.values()) == sum(leaf.size for leaf in jax.tree.leaves(case.params))
    assert counts == cost(case.config, 1, 8, 4).parameters
    language = case.config.language
    assert counts["tokens"] == np.prod((language.vocab, language.decoder.embed)) * (1 if language.tied else 2)
