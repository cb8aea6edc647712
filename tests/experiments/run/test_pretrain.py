"""Pretraining reads each cell off the patch that covers it, and learns."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import distill
from antgmm_jax.errors import AntgmmError
from antgmm_jax.functional import functional
from antgmm_jax.presets import preset
from data.maad.cells import SIDE
from experiments.run.pretrain import CELLS_WEIGHT, _cell_logits, init_params, make_pretrain_step
from experiments.run.schema.recipe import load_training
from experiments.run.training import TrainingRun
from tests.pruning.models import CONFIGS
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


def test_a_cell_is_read_off_its_own_patch():
    config = CONFIG.vision
    patches = config.image // config.patch
    inside, width = SIDE // patches, config.stack.embed
    states = np.zeros((1, 1 + patches**2, width), np.float32)
    # Channel 0 holds the patch's number; class k reads it times k, plus the cell's place inside the patch.
    states[0, 1:, 0] = np.arange(patches**2)
    kernel = np.zeros((width, inside, inside, 2), np.float32)
    kernel[0, ..., 1] = 1.0
    logits = np.asarray(_cell_logits(config, {"kernel": kernel, "bias": np.zeros(2, np.float32)}, states))
    rows = np.arange(SIDE) // inside
    np.testing.assert_array_equal(logits[0, :, :, 1], rows[:, None] * patches + rows)


def test_the_loss_is_the_facts_mean_plus_the_weighted_cells():
    params = functional(CONFIG).init(jax.random.key(0))
    optimizer = distill.make_optimizer(learning_rate=1e-3, steps=3)
    trained = init_params(CONFIG, params, FACTS, 5, jax.random.key(1))
    rows = batch(CONFIG)
    states, queries = functional(CONFIG).vision(params, rows["images"])
    ce = optax.softmax_cross_entropy_with_integer_labels
    facts = []
    for i, name in enumerate(FACTS):
        head = trained["facts"][name]
        facts.append(float(ce(queries[:, 0, i] @ head["kernel"] + head["bias"], rows[f"fact/{name}"]).mean()))
    dense = np.asarray(ce(_cell_logits(CONFIG.vision, trained["cells"], states), rows["cells"].astype(np.int32)))
    weight = np.where(rows["cells"] > 0, 1.0, 0.2)
    expected = np.mean(facts) + CELLS_WEIGHT * (weight * dense).sum() / weight.sum()
    step = make_pretrain_step(CONFIG, params, FACTS, optimizer)
    state = distill.init_state(trained, optimizer)
    _, metrics = step(state, rows, None, None)
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)


def test_in_bfloat16_the_loss_is_nearly_the_same_and_parameters_stay_float32():
    params, rows = functional(CONFIG).init(jax.random.key(0)), batch(CONFIG)
    optimizer, losses = distill.make_optimizer(learning_rate=1e-3, steps=3), []
    for dtype in (jnp.float32, jnp.bfloat16):
        state = distill.init_state(init_params(CONFIG, params, FACTS, 5, jax.random.key(1)), optimizer)
        state, metrics = make_pretrain_step(CONFIG, params, FACTS, optimizer, dtype=dtype)(state, rows, None, None)
        losses.append(float(metrics["loss"]))
        assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)


def test_training_lowers_the_loss_and_leaves_the_language_model_alone():
    params = functional(CONFIG).init(jax.random.key(0))
    optimizer = distill.make_optimizer(learning_rate=3e-3, steps=30)
    trained = init_params(CONFIG, params, FACTS, 5, jax.random.key(1))
    assert set(trained["model"]) == {"vision", "bridge"}
    step, rows = make_pretrain_step(CONFIG, params, FACTS, optimizer), batch(CONFIG)
    state, losses = distill.init_state(trained, optimizer), []
    for _ in range(30):
        state, metrics = step(state, rows, None, None)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.8 * losses[0]


def test_patches_that_split_cells_are_refused():
    config = preset("antgmm-small")
    with pytest.raises(AntgmmError, match="7 patches a side do not divide 16 cells"):
        init_params(config, {"vision": {}, "bridge": {}}, FACTS, 5, jax.random.key(0))


def test_a_type_that_no_question_has_is_refused_before_any_phase(tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("""
seed = 0
checkpoint_every = 1
[model]
preset = "antgmm-tiny"
[data]
kind = "maad"
tier = "s"
samples = 16
[optimizer]
learning_rate = 1e-3
batch_size = 2
[evaluate]
max_new_tokens = 4
[evaluate.data]
split = "val"
samples = 2
[[phase]]
name = "first"
kind = "answers"
steps = 1
[[phase]]
name = "second"
kind = "answers"
steps = 1
types = ["prise"]
""")
    with pytest.raises(AntgmmError, match="phase 'second': no question is of type prise: the data has"):
        TrainingRun(load_training(recipe), tmp_path / "run")()
    assert not [*tmp_path.glob("run/stages/*")]
