"""Scores of whole models: gate gradients equal finite differences and weight gradients; shapes of all methods."""

from functools import cache, reduce
from operator import getitem

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from antgmm_jax.axes import sizes
from antgmm_jax.config import on_image_side, towers
from antgmm_jax.families import family
from antgmm_jax.pure import functional, is_axes, local_axes
from pruning import activation, block_influence, last, magnitude, ones, random, taylor
from tests.families.cases import batch, case_of


@cache
def answer_loss(config):
    """Returns the mean cross-entropy of the answer tokens, as in training."""
    apply = functional(config).apply

    def loss(params, gates, batch):
        logits = apply(params, batch, gates)["logits"]
        at = jnp.take_along_axis(logits, batch["positions"][..., None], axis=1)
        valid = batch["targets"] >= 0
        picked = jnp.take_along_axis(jax.nn.log_softmax(at), jnp.where(valid, batch["targets"], 0)[..., None], axis=-1)
        return -jnp.sum(picked[..., 0] * valid) / valid.sum()

    return loss


@pytest.fixture(scope="module")
def scores(first):
    """Taylor scores of a case."""
    return taylor(answer_loss(first.config), first.params, ones(first.config), [batch(first.config)])


def test_gate_gradients_equal_central_differences(first, scores):
    check_slopes(first, scores)


def test_the_gate_of_a_width_that_scales_the_head_has_the_gradient_of_the_scale_too(tmp_path_factory):
    case = case_of("blip2", "plain, tied, scaled", tmp_path_factory.getbasetemp())
    scores = taylor(answer_loss(case.config), case.params, ones(case.config), [batch(case.config)])
    # Twice curved, by the norms and by the scale: differences over 0.02 are less exact.
    check_slopes(case, {"text/embed": scores["text/embed"]}, part=5e-3)


def check_slopes(case, scores, part=1e-3):
    config, step = case.config, 2e-2
    arrays, open_gates, rng = batch(config), ones(config), np.random.default_rng(0)
    loss = jax.jit(answer_loss(config))
    for axis, score in scores.items():
        for unit in (np.unravel_index(score.argmax(), score.shape), tuple(rng.integers(score.shape))):

            def at(change, axis=axis, unit=unit):
                gate = open_gates[axis].copy()
                gate[unit] += change
                return float(loss(case.params, {**open_gates, axis: gate}, arrays))

            coarse, fine = ((at(h) - at(-h)) / (2 * h) for h in (step, step / 2))
            # Richardson extrapolation, because the gate of a width enters every norm and the loss is strongly curved.
            slope = (4 * fine - coarse) / 3
            assert abs(abs(slope) - score[unit]) <= 1e-4 + part * score.max(), (axis, unit)


def carriers(config):
    """Axis of heads or hidden units -> paths and axes of the kernels that read the units' outputs."""
    kernels = {}
    for path, axes in jax.tree_util.tree_leaves_with_path(functional(config).axes, is_leaf=is_axes):
        keys = tuple(key.key for key in path)
        # The last axis of a kernel is the one that it writes.
        for axis in set(axes[:-1]) & set(sizes(config)) if keys[-1] in ("o", "down") else ():
            if not axis.endswith(("/layers", "/embed")):
                kernels.setdefault(axis, []).append((keys, axes))
    return kernels


def test_gate_gradients_are_the_signed_sum_of_weight_times_gradient(first, scores):
    """The paper's score, over the weights that read a unit's output."""
    config, params, places = first.config, first.params, carriers(first.config)
    units = {axis for axis in sizes(config) if axis.split("/")[1] not in ("layers", "embed")}
    assert set(places) == units

    def signed_sums(params, gates, batch):
        product = jax.tree.map(jnp.multiply, params, jax.grad(answer_loss(config))(params, gates, batch))
        return {
            axis: sum(_by_unit(reduce(getitem, keys, product), axes, axis, local_axes(config)) for keys, axes in paths)
            for axis, paths in places.items()
        }

    sums = jax.jit(signed_sums)(params, ones(config), batch(config))
    rows = family(config).depth.array_keep(config, {axis: scores[axis] for axis in places})
    for axis, total in sums.items():
        np.testing.assert_allclose(rows[axis], np.abs(total), rtol=1e-4, atol=1e-6, err_msg=axis)


def _by_unit(product, axes, axis, local):
    kept = {axes.index(axis), 0} if axis in local else {axes.index(axis)}
    return product.sum(tuple(set(range(product.ndim)) - kept))


def test_every_method_scores_all_of_its_units(first, scores):
    config, arrays, apply = first.config, batch(first.config), functional(first.config).apply
    present, local, shapes = sizes(config), local_axes(config), {a: gate.shape for a, gate in ones(config).items()}
    units = [axis for axis in present if not axis.endswith("/layers")]
    depths = [axis for axis in present if axis.endswith("/layers")]
    made = {
        "taylor": (scores, present),
        "magnitude": (magnitude(first.params, config), present),
        "random": (random(jax.random.key(0), present, local), present),
        "activation": (activation(apply, first.params, [arrays], units, local), units),
        "block influence": (block_influence(apply, first.params, [arrays], towers(config).values()), depths),
        "last": (last(present), depths),
    }
    for method, (by_axis, axes) in made.items():
        assert {axis: score.shape for axis, score in by_axis.items()} == {axis: shapes[axis] for axis in axes}, method
        for axis, score in by_axis.items():
            assert score.dtype == np.float32 and np.isfinite(score).all() and (score >= 0).all(), (method, axis)
            assert score.any(), (method, axis)
    assert all(((score > 0) & (score < 2)).all() for score in made["block influence"][0].values())


def test_unused_image_slots_count_for_nothing(first):
    """As in a data set where one row has many more pictures, or a larger one, than the others."""
    config, rows = first.config, batch(first.config)
    images = rows["images"]
    more = {name: np.concatenate([leaf, np.zeros_like(leaf)], axis=1) for name, leaf in images.items()}
    axes = [axis for axis in sizes(config) if on_image_side(axis) and not axis.endswith("layers")]
    local = local_axes(config)
    plain, padded = (
        activation(functional(config).apply, first.params, [{**rows, "images": each}], axes, local)
        for each in (images, more)
    )
    for axis in axes:
        np.testing.assert_allclose(padded[axis], plain[axis], rtol=1e-4, atol=1e-6)
