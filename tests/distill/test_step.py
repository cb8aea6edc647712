"""The train step on a toy model: one compile, exact accumulation, donated state, every loss at once."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from antgmm_jax.errors import AntgmmError
from distill.align import Part
from distill.losses import LossConfig
from distill.optimizer import OptimizerConfig, make_optimizer
from distill.state import init_state
from distill.step import make_loss, make_step
from distill.teacher import NO_TEACHER, online
from tests.distill import toy

STUDENT, TEACHER = toy.toy(4, 2), toy.toy(6, 3)
TEACHER_PARAMS = TEACHER.init(jax.random.key(1))
LAYERS, EMBED = np.array([0, 2]), np.array([0, 1, 3, 5])
PARTS = tuple(
    Part(term, "text", "text/states", LAYERS, EMBED, "text/layers", "text/embed", mask)
    for term, mask in [
        ("hidden", lambda batch: batch["attention_mask"] != 0),
        ("vision", lambda batch: batch["input_ids"] == toy.IMAGE),
    ]
)
ALL = LossConfig(hard=1.0, soft=0.5, pair=0.3, rank=0.2, hidden=0.4, vision=0.1, temperature=2.0)


def fresh(optimizer):
    return init_state(STUDENT.init(jax.random.key(0)), optimizer)


def gates(*, layers=(1.0, 1.0), embed=(1.0,) * 4):
    return {"text/layers": jnp.array(layers), "text/embed": jnp.array(embed)}


def make(config=ALL, *, optimizer=None, **options):
    optimizer = optimizer or make_optimizer(OptimizerConfig(learning_rate=0.02, schedule="constant"), steps=100)
    teacher = online(TEACHER, TEACHER_PARAMS)
    return optimizer, teacher, make_step(STUDENT, optimizer, config, teacher=teacher, parts=PARTS, **options)


def test_training_lowers_the_sum_of_all_losses():
    optimizer, teacher, step = make()
    state, batch = fresh(optimizer), toy.device(toy.batch(0))
    history, metrics = [], {}
    for _ in range(40):
        state, metrics = step(state, batch, {}, teacher.params)
        history.append(float(metrics["loss"]))
    assert history[-1] < 0.5 * history[0]
    assert set(metrics) == {*ALL.terms(), "loss", "grad_norm", "learning_rate", "tokens"}
    expected = sum(getattr(ALL, name) * metrics[name] for name in ALL.terms())
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)
    assert metrics["tokens"] == (batch["targets"] != -100).sum()
    assert state.step == 40


def test_one_program_serves_all_learning_rates():
    schedules = ({"learning_rate": 0.1, "schedule": "constant"}, {"learning_rate": 0.02, "schedule": "cosine"})
    texts, rates = set(), []
    for number, schedule in enumerate(schedules):
        optimizer, teacher, step = make(optimizer=make_optimizer(OptimizerConfig(**schedule), 10 * (number + 1)))
        state, batch = fresh(optimizer)._replace(step=jnp.array(10)), toy.device(toy.batch(0))
        rate = step.schedule(state.step)
        texts.add(step.program.lower(state, batch, {}, teacher.params, rate).as_text())
        before = state.params
        after, metrics = step(jax.tree.map(jnp.array, state), batch, {}, teacher.params)
        assert metrics["learning_rate"] == rate
        rates.append((float(rate), jax.tree.map(lambda new, old: float(abs(new - old).max()), after.params, before)))
    assert len(texts) == 1
    (fast, far), (slow, near) = rates
    assert (fast, slow) == pytest.approx((0.1, 0.01))
    # The length of Adam's first step is proportional to the rate.
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, 10 * other, rtol=1e-3), far, near)


def test_hard_loss_alone_equals_the_logits_cross_entropy_and_needs_no_teacher():
    loss = make_loss(STUDENT, LossConfig(), teacher=NO_TEACHER)
    params, batch = STUDENT.init(jax.random.key(0)), toy.device(toy.batch(0))
    value, terms = loss(params, {}, batch, NO_TEACHER.params)
    logits = np.take_along_axis(STUDENT.apply(params, batch)["logits"], batch["positions"][..., None], axis=1)
    valid = batch["targets"] != -100
    expected = optax.softmax_cross_entropy_with_integer_labels(logits[valid], batch["targets"][valid]).mean()
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert set(terms) == {"hard"}


@pytest.mark.parametrize("pieces", [2, 4])
def test_micro_batches_equal_the_big_batch(pieces):
    batch = toy.device(toy.batch(3, size=8))
    counts = (batch["targets"] != -100).sum(1).reshape(-1, pieces).sum(0)
    assert len(set(counts.tolist())) > 1, "pieces must differ in valid tokens for this to test anything"
    results = []
    for micro_batches in (1, pieces):
        # A rate of 1 on the raw gradient: Adam's own scaling would hide a wrong factor.
        plain = make_optimizer(OptimizerConfig(learning_rate=1.0, schedule="constant"), steps=1)
        plain = plain._replace(transform=optax.identity())
        optimizer, teacher, step = make(optimizer=plain, micro_batches=micro_batches)
        results.append(step(fresh(optimizer), batch, {}, teacher.params))
    (whole, metrics), (split, split_metrics) = results
    for got, want in zip(jax.tree.leaves(split.params), jax.tree.leaves(whole.params), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)
    for name in metrics:
        np.testing.assert_allclose(split_metrics[name], metrics[name], rtol=1e-5)


def test_a_batch_that_does_not_split_is_refused():
    optimizer, teacher, step = make(micro_batches=3)
    with pytest.raises(AntgmmError, match="4 does not split into 3"):
        step(fresh(optimizer), toy.device(toy.batch(0)), {}, teacher.params)


def test_gates_change_under_one_compile_and_are_not_trained():
    optimizer, teacher, step = make()
    state, batch = fresh(optimizer), toy.device(toy.batch(0))
    losses = []
    for embed in [(1.0, 1, 1, 1), (1.0, 1, 0, 1), (1.0, 0, 0, 1)]:
        closed = gates(layers=(1.0, 0.0), embed=embed)
        state, metrics = step(state, batch, closed, teacher.params)
        losses.append(float(metrics["loss"]))
        np.testing.assert_array_equal(closed["text/embed"], embed)
    assert step.program._cache_size() == 1
    assert np.isfinite(losses).all()
    assert len(set(losses)) == 3


def test_the_loss_treats_closed_layers_and_channels_as_cut():
    params, batch = STUDENT.init(jax.random.key(0)), toy.device(toy.batch(0))
    teacher = online(TEACHER, TEACHER_PARAMS)
    gated = make_loss(STUDENT, ALL, teacher=teacher, parts=PARTS)
    value, _ = gated(params, gates(layers=(0.0, 1.0), embed=(1.0, 0, 1, 1)), batch, teacher.params)

    channels = np.array([0, 2, 3])
    text = params["text"]
    blocks = text["blocks"][1:][:, channels][:, :, channels]
    small = {
        "text": {"table": text["table"][:, channels], "blocks": blocks, "bias": text["bias"][1:, channels]},
        "head": {"kernel": params["head"]["kernel"][channels]},
    }
    cut = tuple(part._replace(layers=LAYERS[1:], embed=EMBED[channels]) for part in PARTS)
    shrunk = make_loss(toy.toy(3, 1), ALL, teacher=teacher, parts=cut)
    expected, _ = shrunk(small, {}, batch, teacher.params)
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_state_is_donated_and_the_teacher_is_not():
    optimizer, teacher, step = make()
    state = fresh(optimizer)
    step(state, toy.device(toy.batch(0)), {}, teacher.params)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(teacher.params))


def test_frozen_parameters_stay_and_have_no_moments():
    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.02), steps=100, frozen=("text/table", "head"))
    optimizer, teacher, step = make(optimizer=optimizer, micro_batches=2)
    before = jax.tree.map(np.array, STUDENT.init(jax.random.key(0)))
    state, _ = step(fresh(optimizer), toy.device(toy.batch(0)), {}, teacher.params)
    np.testing.assert_array_equal(state.params["text"]["table"], before["text"]["table"])
    np.testing.assert_array_equal(state.params["head"]["kernel"], before["head"]["kernel"])
    assert (np.array(state.params["text"]["blocks"]) != before["text"]["blocks"]).any()
    assert optax.tree.get(state.opt_state, "mu")["head"]["kernel"] is None


def test_bfloat16_compute_keeps_float32_master_parameters():
    batch, losses = toy.device(toy.batch(0)), {}
    for dtype in (jnp.float32, jnp.bfloat16):
        optimizer, teacher, step = make(dtype=dtype)
        state, metrics = step(fresh(optimizer), batch, {}, teacher.params)
        assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype(jnp.float32)}
        losses[dtype] = float(metrics["loss"])
    assert losses[jnp.bfloat16] != losses[jnp.float32]
    np.testing.assert_allclose(losses[jnp.bfloat16], losses[jnp.float32], rtol=0.05)


def test_losses_without_their_sources_are_refused():
    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.1), steps=1)
    with pytest.raises(AntgmmError, match="no teacher"):
        make_step(STUDENT, optimizer, LossConfig(soft=1.0))
    with pytest.raises(AntgmmError, match=r"hidden.*parts="):
        make_step(STUDENT, optimizer, LossConfig(hidden=1.0), teacher=online(TEACHER, TEACHER_PARAMS))
