"""Adapters add the product of two small factors to linear maps, and only the factors are trained."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from antgmm_jax.errors import AntgmmError
from antgmm_jax.parallel.sharding import make_mesh, place_tree
from antgmm_jax.presets import preset
from antgmm_jax.pure import abstract, functional
from distill import LossConfig, OptimizerConfig, init_state, make_loss, make_optimizer, make_step
from distill.adapters import adapted, merged, with_adapters
from tests.programs import equations
from tests.pruning.models import CONFIGS, EACH, batch_of, parameters, valid_logits

RANKS = {"language": 2, "language/decoder": 3}


def ready(family):
    params = jax.tree.map(jnp.asarray, parameters(family))
    return params, with_adapters(params, RANKS, jax.random.key(0))


@pytest.mark.parametrize("family", EACH)
def test_new_adapters_change_nothing(family):
    params, held = ready(family)
    jax.tree.map(np.testing.assert_array_equal, merged(held), params)


@pytest.mark.parametrize("family", EACH)
def test_an_adapter_adds_its_product_layer_by_layer_with_the_rank_of_the_longest_prefix(family):
    params, held = ready(family)
    path, shape = "language/decoder/blocks/attention/q", params["language"]["decoder"]["blocks"]["attention"]["q"].shape
    rng = np.random.default_rng(0)
    a, b = held["adapters"][path].values()
    assert (a.shape, b.shape) == ((shape[0], shape[1], 3), (shape[0], 3, np.prod(shape[2:])))
    b = rng.normal(size=b.shape).astype(np.float32)
    held["adapters"][path]["b"] = jnp.asarray(b)
    expected = [
        np.asarray(params["language"]["decoder"]["blocks"]["attention"]["q"][layer])
        + (np.asarray(a[layer]) @ b[layer]).reshape(shape[1:])
        for layer in range(shape[0])
    ]
    got = merged(held)["language"]["decoder"]["blocks"]["attention"]["q"]
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    others = {name.split("/")[0] for name in held["adapters"]}
    assert others == {"language"}


def test_merging_does_not_round_the_factors_on_accelerators():
    _, held = ready("llava")
    products = [e for e in equations(jax.make_jaxpr(merged)(held).jaxpr) if e.primitive.name == "dot_general"]
    assert len(products) == len(held["adapters"])
    assert all(e.params["precision"] == (jax.lax.Precision.HIGHEST,) * 2 for e in products)


@pytest.mark.parametrize("name", ["gemma3-tiny", "smolvlm-tiny"])
def test_the_only_map_of_a_bridge_has_an_adapter(name):
    shapes = abstract(preset(name))
    held = jax.eval_shape(lambda params: with_adapters(params, {"bridge": 2}, jax.random.key(0)), shapes)
    (path,), kernel = held["adapters"], shapes["bridge"]["kernel"]
    a, b = held["adapters"][path].values()
    assert path == "bridge/kernel" and a.shape == (kernel.size // kernel.shape[-1], 2)
    assert b.shape == (2, kernel.shape[-1])


def test_adapters_of_the_image_side_are_computed():
    config, params = CONFIGS["llava"], jax.tree.map(jnp.asarray, parameters("llava"))
    held = with_adapters(params, {"vision": 2}, jax.random.key(0))
    assert "vision/patch" in held["adapters"]
    batch = batch_of(config)
    got = adapted(functional(config), {"vision": 2}).apply(held, batch)["logits"]
    np.testing.assert_allclose(got, functional(config).apply(params, batch)["logits"], rtol=1e-5, atol=1e-5)


def test_a_prefix_without_a_linear_map_is_refused():
    with pytest.raises(AntgmmError, match="adapters of language/tokens matches no linear map"):
        with_adapters(abstract(CONFIGS["llava"]), {"language/tokens": 2}, jax.random.key(0))


@pytest.mark.parametrize("family", EACH)
def test_a_step_trains_the_factors_only_and_the_merged_model_is_the_trained_one(family):
    config, rows = CONFIGS[family], batch_of(CONFIGS[family])
    params, held = ready(family)
    pure = adapted(functional(config), RANKS)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-2), steps=20, frozen=("vision", *RANKS))
    step, state = make_step(pure, optimizer, LossConfig(hard=1.0)), init_state(held, optimizer)
    losses = []
    for _ in range(10):
        state, metrics = step(state, rows, {}, {})
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]
    for part in ("vision", "language"):
        jax.tree.map(np.testing.assert_array_equal, state.params[part], params[part])
    plain = merged(state.params)
    assert not np.array_equal(
        plain["language"]["decoder"]["blocks"]["mlp"]["up"], params["language"]["decoder"]["blocks"]["mlp"]["up"]
    )
    one, other = (
        valid_logits(rows, f.apply(p, rows)["logits"]) for f, p in ((pure, state.params), (functional(config), plain))
    )
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.long
@pytest.mark.parametrize("family", EACH)
def test_a_mesh_that_splits_widths_gives_the_gradients_of_one_device(family):
    config, rows = CONFIGS[family], batch_of(CONFIGS[family])
    params = jax.tree.map(jnp.asarray, parameters(family))
    ranks = {"language": 2, "bridge": 2}  # in the stacks, and outside of them
    held, pure = with_adapters(params, ranks, jax.random.key(0)), adapted(functional(config), ranks)
    held["adapters"] = jax.tree.map(lambda leaf: leaf + 0.1, held["adapters"])
    loss = make_loss(pure, LossConfig(hard=1.0))

    def run(factors):
        return loss({**held, "adapters": factors}, {}, rows, {})[0]

    value, gradient = jax.jit(jax.value_and_grad(run))(held["adapters"])
    with jax.set_mesh(make_mesh(fsdp=2)):
        held = place_tree(held, pure.axes)
        meshed, other = jax.jit(jax.value_and_grad(run))(held["adapters"])
    np.testing.assert_allclose(meshed, value, rtol=1e-5)
    jax.tree.map(lambda one, two: np.testing.assert_allclose(one, two, atol=1e-5), gradient, other)
