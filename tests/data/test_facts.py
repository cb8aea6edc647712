"""Pretraining predicts each fact from its token or from all, and each cell from the patch that covers it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from antgmm_jax.errors import AntgmmError
from antgmm_jax.presets import preset
from antgmm_jax.pure import functional
from data.facts import CELLS_WEIGHT, cell_logits, classes_of, facts_loss, with_heads
from data.maad.cell_grid import SIDE
from tests.pruning.models import CONFIGS, EACH
from tests.reference import squares

FACTS = {"colour": 3, "sign": 2}
CONFIG = CONFIGS["blip2_t5"]


def batch(config, rows=6):
    rng = np.random.default_rng(0)
    side = config.vision.image
    return {
        "images": squares(rng.normal(size=(rows, 3, side, side)).astype(np.float32)),
        "cells": rng.integers(0, 5, (rows, SIDE, SIDE), dtype=np.uint8),
        **{f"fact/{name}": rng.integers(0, n, rows, dtype=np.int32) for name, n in FACTS.items()},
    }


def test_a_cell_is_predicted_from_its_own_patch():
    config = CONFIG.vision
    patches = config.image // config.patch
    inside, width = SIDE // patches, config.stack.embed
    states = np.zeros((1, 1 + patches**2, width), np.float32)
    # Channel 0 holds the patch's number; class k reads it times k, plus the cell's place inside the patch.
    states[0, 1:, 0] = np.arange(patches**2)
    kernel = np.zeros((width, inside, inside, 2), np.float32)
    kernel[0, ..., 1] = 1.0
    logits = np.asarray(cell_logits(config, {"kernel": kernel, "bias": np.zeros(2, np.float32)}, states))
    rows = np.arange(SIDE) // inside
    np.testing.assert_array_equal(logits[0, :, :, 1], rows[:, None] * patches + rows)


@pytest.mark.parametrize("family", EACH)
def test_the_loss_is_the_mean_over_facts_plus_the_weighted_cell_loss(family):
    config = CONFIGS[family]
    params = functional(config).init(jax.random.key(0))
    trained = with_heads(config, params, FACTS, 5, jax.random.key(1))
    rows = batch(config)
    states, tokens = functional(config).vision(params, rows["images"])
    ce = optax.softmax_cross_entropy_with_integer_labels
    facts = []
    for i, name in enumerate(FACTS):
        head = trained["facts"][name]
        # Without layers in the bridge no token gathers a fact.
        read = tokens[:, 0, i] if family == "blip2_t5" else tokens[:, 0].mean(axis=1)
        facts.append(float(ce(read @ head["kernel"] + head["bias"][None], rows[f"fact/{name}"]).mean()))
    dense = np.asarray(ce(cell_logits(config.vision, trained["cells"], states), rows["cells"].astype(np.int32)))
    weight = np.where(rows["cells"] > 0, 1.0, 0.2)
    expected = np.mean(facts) + CELLS_WEIGHT * (weight * dense).sum() / weight.sum()
    facts_and_cells = facts_loss(config, params, FACTS, dtype=jnp.float32)
    np.testing.assert_allclose(facts_and_cells(trained, rows)[0], expected, rtol=1e-5)
    # Rows of users have no cells.
    plain = {name: trained[name] for name in ("model", "facts")}
    del rows["cells"]
    np.testing.assert_allclose(facts_and_cells(plain, rows)[0], np.mean(facts), rtol=1e-5)
    assert with_heads(config, params, FACTS, 0, jax.random.key(1)).keys() == plain.keys()


def test_a_row_of_several_slots_is_read_as_a_whole():
    """Tiles, squares and further pictures; slots that a row does not use are left out."""
    config = CONFIGS["llava"]
    trained = with_heads(config, params := functional(config).init(jax.random.key(0)), FACTS, 0, jax.random.key(1))
    rows = {name: value for name, value in batch(config).items() if name != "cells"}
    loss = facts_loss(config, params, FACTS, dtype=jnp.float32)
    one = {name: np.asarray(leaf) for name, leaf in rows["images"].items()}
    twice = {name: np.concatenate([leaf, leaf], axis=1) for name, leaf in one.items()}
    expected = loss(trained, rows)[0]
    np.testing.assert_allclose(loss(trained, {**rows, "images": twice})[0], expected, rtol=1e-6)
    twice["pixels"][:, 1] += 1.0
    unused = {**twice, "valid": twice["valid"] & np.array([True, False])}
    np.testing.assert_allclose(loss(trained, {**rows, "images": unused})[0], expected, rtol=1e-6)
    assert abs(float(loss(trained, {**rows, "images": twice})[0]) - float(expected)) > 1e-4


def test_classes_are_counted_from_the_rows():
    assert classes_of([("a", {"colour": 2, "sign": 0}), ("b", {"sign": 1, "colour": 0})]) == FACTS


@pytest.mark.parametrize(
    ("rows", "fault"),
    [
        ([{"x": 1}, {"x": 1, "y": 0}], "b: latents x, y: a phase of kind facts needs the same in all rows, here x"),
        ([{}], r"a: latents \(none\): a phase of kind facts needs the same in all rows"),
        ([{"x": 0}, {"x": -1}], "b: latent x = -1: number its classes from 0"),
    ],
)
def test_rows_without_the_same_facts_are_refused(rows, fault):
    with pytest.raises(AntgmmError, match=fault):
        classes_of(zip("ab", rows, strict=False))


def test_patches_that_split_cells_are_refused():
    config = preset("antgmm-small")
    with pytest.raises(AntgmmError, match="7 patches per side do not divide 16 cells"):
        with_heads(config, {"vision": {}, "bridge": {}}, FACTS, 5, jax.random.key(0))
