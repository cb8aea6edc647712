"""Cuts to principal components: equal logits where nothing is lost, small cases by hand, and errors."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from antgmm_jax.errors import AntgmmError
from antgmm_jax.io.convert import open_hf, save_hf
from antgmm_jax.pure import functional, is_axes
from pruning.components import _second_moments, fold_norms, principal, project, untie
from pruning.gates import gates_of
from pruning.keep import compose, identity, merge, untied
from pruning.shrinking import shrink
from tests.marks import long
from tests.programs import equations
from tests.pruning.models import CONFIGS, batch_of, parameters

WIDTHS = [long("blip2_t5", "vision/embed"), long("blip2_t5", "text/embed"), ("llava", "text/embed")]
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def model(family):
    return CONFIGS[family], parameters(family)


def logits(config, params, batch):
    return jax.jit(lambda params, batch: functional(config).apply(params, batch)["logits"])(params, batch)


def components(config, params, batch, axis, count):
    return principal(functional(config).apply, params, config, [batch], {axis: count})


@pytest.mark.parametrize(("family", "axis"), WIDTHS)
def test_keeping_all_components_leaves_the_logits_unchanged(family, axis):
    config, params = model(family)
    batch, size = batch_of(config), identity(config)[axis].size
    basis = components(config, params, batch, axis, size)
    assert not np.allclose(basis[axis], np.eye(size))
    before = jax.tree.map(np.copy, params)
    same, turned = shrink(config, params, basis)
    assert same == (untied(config) if axis == "text/embed" else config)
    jax.tree.map(np.testing.assert_array_equal, params, before)
    np.testing.assert_allclose(logits(same, turned, batch), logits(config, params, batch), **CLOSE)


@pytest.mark.parametrize(("family", "axis"), WIDTHS)
def test_unused_directions_are_cut_without_loss(family, axis):
    config, params = model(family)
    batch, size = batch_of(config), identity(config)[axis].size
    centred = axis == "vision/embed"
    # Everything written to the stream lies in a few directions; for a LayerNorm these sum to 0.
    rng, held = np.random.default_rng(0), 8
    directions = rng.normal(size=(size, held))
    directions = np.linalg.qr(directions - centred * directions.mean(0))[0]
    onto = (directions @ directions.T).astype(np.float32)

    def flatten(path, leaf, names):
        if axis not in names or any("norm" in str(key) for key in path):
            return leaf
        dim = names.index(axis)
        return np.moveaxis(np.tensordot(leaf, onto, (dim, 0)), -1, dim)

    config, params = untie(config, params)
    params = jax.tree_util.tree_map_with_path(
        flatten, fold_norms(config, params, [axis]), jax.tree.unflatten(jax.tree.structure(params), axes_of(config))
    )
    smaller, cut = shrink(config, params, components(config, params, batch, axis, held + centred))
    assert identity(smaller)[axis].size == held + centred
    np.testing.assert_allclose(logits(smaller, cut, batch), logits(config, params, batch), **CLOSE)


def test_an_untied_head_is_the_scaled_token_table():
    config, params = model("blip2_t5")  # tied and scaled by 20 ** -0.5, as in T5 v1.0
    own, apart = untie(config, params)
    assert not own.language.tied and not own.language.scaled_head
    np.testing.assert_allclose(apart["language"]["out"], params["language"]["tokens"].T / 20**0.5, rtol=1e-6)
    assert apart["language"]["tokens"] is params["language"]["tokens"]


def axes_of(config):
    return jax.tree.leaves(functional(config).axes, is_leaf=is_axes)


def test_a_basis_by_hand():
    # Three tokens along the first channel, one along the second, padding along the third: the first component has 3/4
    # of the variance, so a norm over 1 instead of 3 channels divides by a factor of sqrt(3/4 * 3) more.
    states = jnp.array([[[[2.0, 0, 0], [-1, 0, 0], [5, 0, 0], [0, 4, 0], [0, 0, 9]]]], jnp.float32)
    batch = {"attention_mask": np.array([[1, 1, 1, 1, 0]])}
    basis = principal(
        lambda params, batch, collect: dict.fromkeys(collect, states),
        {},
        CONFIGS["llava"],
        [batch],
        {"text/embed": 1},
    )["text/embed"]
    np.testing.assert_allclose(np.abs(basis), [[1.5], [0], [0]], atol=1e-6)


def test_products_do_not_round_their_factors_on_accelerators():
    config, params = model("llava")
    bases = {"text/embed": np.eye(36, 24, dtype=np.float32)}
    programs = [
        jax.make_jaxpr(lambda states: _second_moments(states, np.ones((2, 3), bool), centred=True))(
            np.ones((1, 2, 3, 4))
        ),
        jax.make_jaxpr(lambda params: project(config, params, bases)[1])(params),
    ]
    for program in programs:
        products = [e for e in equations(program.jaxpr) if e.primitive.name == "dot_general"]
        assert products and all(e.params["precision"] == (jax.lax.Precision.HIGHEST,) * 2 for e in products)


def test_the_shared_basis_of_t5_covers_both_stacks():
    # The encoder's states have one direction, the decoder's another, padding a third.
    config, rng = CONFIGS["blip2_t5"], np.random.default_rng(0)
    one, other, padding = np.linalg.qr(rng.normal(size=(20, 3)))[0].T.astype(np.float32)
    tokens = {"encoder": np.stack([one, -3 * one, 2 * one, padding]), "decoder": np.stack([5 * other, 9 * padding])}
    batch = {"attention_mask": np.array([[1, 1, 1, 0]]), "labels": np.array([[4, -100]])}
    basis = principal(
        lambda params, batch, collect: {name: jnp.asarray(tokens[name.split("/")[0]])[None, None] for name in collect},
        {},
        config,
        [batch],
        {"text/embed": 2},
    )["text/embed"]
    # A norm over 2 instead of 20 channels with the same sum of squares divides by sqrt(10) more.
    np.testing.assert_allclose(basis @ basis.T, 10 * (np.outer(one, one) + np.outer(other, other)), atol=1e-5)


@pytest.mark.parametrize(("family", "axis"), WIDTHS)
def test_a_later_cut_composes_with_a_basis(family, axis):
    config, params = model(family)
    basis = components(config, params, batch_of(config), axis, 9)
    first, turned = shrink(config, params, basis)
    then = {axis: np.array([0, 2, 3], np.int32), "vision/mlp": np.tile(np.arange(4, dtype=np.int32), (3, 1))}
    smaller, expected = shrink(first, turned, then)
    keep = compose(compose(identity(config), basis), then)
    actual, cut = shrink(config, params, keep)
    assert actual == smaller
    for one, other in zip(jax.tree.leaves(cut), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, **CLOSE)
    again = {axis: np.eye(9, 2, dtype=np.float32)}
    np.testing.assert_array_equal(compose(basis, again)[axis], basis[axis][:, :2])


def test_a_basis_of_one_run_merges_with_cuts_of_another():
    config, params = model("llava")
    basis = components(config, params, batch_of(config), "text/embed", 24)
    mlp = {"text/mlp": np.tile(np.arange(4, dtype=np.int32), (3, 1)), "bridge/mlp": np.arange(24, dtype=np.int32)}
    joined = merge(compose(identity(config), basis), mlp, config=config)
    np.testing.assert_array_equal(joined["text/embed"], basis["text/embed"])
    (actual, cut), (expected, then) = shrink(config, params, joined), shrink(*shrink(config, params, basis), mlp)
    assert actual == expected
    for one, other in zip(jax.tree.leaves(cut), jax.tree.leaves(then), strict=True):
        np.testing.assert_allclose(one, other, **CLOSE)


@pytest.mark.parametrize(
    ("family", "axis", "reason"),
    [
        ("blip2_t5", "bridge/embed", "a norm writes to its residual stream"),
        ("llava", "vision/embed", "a norm writes to its residual stream"),
        ("blip2_t5", "vision/mlp", "only widths"),
        ("blip2_t5", "vision/embed", "vision/embed = 1: choose 2 to 24 components"),
        ("blip2_t5", "text/embed", "text/embed = 21: choose 1 to 20 components"),
    ],
)
def test_an_axis_without_components_is_refused(family, axis, reason):
    config, params = model(family)
    with pytest.raises(AntgmmError, match=reason):
        components(config, params, batch_of(config), axis, int(reason.split()[2].rstrip(":")) if "=" in reason else 4)


def test_norms_that_no_bias_can_absorb_are_refused():
    config, params = model("blip2_t5")
    stack = dataclasses.replace(config.vision.stack, mlp_bias=False)
    bare = dataclasses.replace(config, vision=dataclasses.replace(config.vision, stack=stack))
    with pytest.raises(AntgmmError, match="vision/stack/blocks/mlp/up has no bias to absorb the bias of its norm"):
        principal(functional(config).apply, params, bare, [], {"vision/embed": 4})


def test_a_basis_that_does_not_fit_is_refused():
    config, params = model("llava")
    basis = components(config, params, batch_of(config), "text/embed", 24)
    with pytest.raises(AntgmmError, match=r"text/embed: a basis of shape \(35, 24\), expected \[36, k\]"):
        shrink(config, params, {"text/embed": basis["text/embed"][1:]})
    with pytest.raises(AntgmmError, match="there are no gates"):
        gates_of(basis, config)
    cut = compose(identity(config), {"text/embed": np.arange(1, 31, dtype=np.int32)})
    with pytest.raises(AntgmmError, match="prune the axis to components first"):
        compose(cut, {"text/embed": np.eye(30, 2, dtype=np.float32)})


def test_a_model_on_disk_is_refused(tmp_path):
    config, params = model("llava")
    save_hf(config, params, tmp_path / "model")
    with pytest.raises(AntgmmError, match="load the model with load_hf"):
        shrink(*open_hf(tmp_path / "model"), {"text/embed": np.eye(36, 24, dtype=np.float32)})
