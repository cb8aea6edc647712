"""The training loop resumes bit for bit, never saves a non-finite state, and reports why it stopped."""

import itertools
import os
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from antgmm_jax.errors import AntgmmError
from antgmm_jax.parallel import preemption
from distill.loop import train
from distill.losses import LossConfig
from distill.optimizer import OptimizerConfig, make_optimizer
from distill.state import init_state
from distill.step import make_step
from distill.teacher import online
from tests.distill import toy

STUDENT, TEACHER = toy.toy(4, 2), toy.toy(6, 3)
TEACH = online(TEACHER, TEACHER.init(jax.random.key(1)))
OPTIMIZER = make_optimizer(OptimizerConfig(learning_rate=0.02, warmup=2), steps=12)
STEP = make_step(STUDENT, OPTIMIZER, LossConfig(hard=1.0, soft=1.0), teacher=TEACH)


def fresh():
    return init_state(STUDENT.init(jax.random.key(0)), OPTIMIZER)


def data(start=0):
    return (toy.batch(seed) for seed in itertools.count(start))


def gates_at(step):
    return {"text/embed": np.array([1.0, 1.0, 1.0, 0.0 if step >= 4 else 1.0], np.float32)}


def run(state, batches, steps, **options):
    return train(STEP, state, batches, steps=steps, gates_at=gates_at, teacher=TEACH, **options)


def test_a_resumed_run_equals_one_run_bit_for_bit():
    whole, metrics = run(fresh(), data(), 9)
    kept = {}
    run(fresh(), data(), 5, save_every=5, save=lambda state: kept.update(state=jax.device_get(state)) or "five")
    resumed, resumed_metrics = run(jax.tree.map(jnp.asarray, kept["state"]), data(5), 9, report_every=3)
    assert resumed_metrics == metrics
    for got, want in zip(jax.tree.leaves(resumed), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(got, want)


def test_a_run_that_sigterm_ended_saves_its_last_step_and_resumes_bit_for_bit():
    whole, metrics = run(fresh(), data(), 9)
    kept, messages = {}, []

    def signalled():
        for seed, batch in zip(itertools.count(), data(), strict=False):
            if seed == 5:
                os.kill(os.getpid(), signal.SIGTERM)
                while not messages:
                    time.sleep(0.01)
            yield batch

    save = lambda state: kept.update({int(state.step): jax.device_get(state)}) or "saved"  # noqa: E731
    with preemption.watched(messages.append), pytest.raises(preemption.Preempted):
        run(fresh(), signalled(), 9, save_every=4, save=save)
    assert [*kept] == [4, 6]
    resumed, resumed_metrics = run(jax.tree.map(jnp.asarray, kept[6]), data(6), 9)
    assert resumed_metrics == metrics
    for got, want in zip(jax.tree.leaves(resumed), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(got, want)


def test_a_step_is_saved_before_the_next_batch_is_read():
    taken = []

    def counted():
        for seed in itertools.count():
            taken.append(seed)
            yield toy.batch(seed)

    saved = []
    run(fresh(), counted(), 6, save_every=2, save=lambda state: saved.append((int(state.step), len(taken))) or "x")
    assert saved == [(2, 2), (4, 4), (6, 6)]


def test_progress_reports_steps_and_metrics():
    seen = []
    run(fresh(), data(), 7, report=seen.append, report_every=3)
    assert [(p.step, p.steps) for p in seen] == [(1, 7), (3, 7), (6, 7), (7, 7)]
    assert {"loss", "hard", "soft", "grad_norm", "learning_rate", "tokens"} == set(seen[0].metrics)


@pytest.mark.parametrize("bad", [3, 4, 5])
def test_a_loss_that_is_not_finite_stops_with_step_ids_and_checkpoint(bad):
    saved = []

    def save(state):
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(state)))
        saved.append(int(state.step))
        return f"step-{saved[-1]}"

    def poisoned(step):
        return {"text/embed": np.full(4, np.nan if step >= bad else 1.0, np.float32)}

    with pytest.raises(AntgmmError) as caught:
        train(STEP, fresh(), data(), steps=9, gates_at=poisoned, teacher=TEACH, save=save, save_every=2)
    assert saved == list(range(2, bad + 1, 2))
    message = str(caught.value)
    assert f"stopped at step {bad}: loss = nan" in message
    assert "hard = nan" in message
    assert f"row-{bad}-0" in message
    assert f"last good checkpoint: step-{saved[-1]}" in message


def test_a_non_finite_parameter_is_not_saved_after_a_finite_loss():
    huge = OPTIMIZER._replace(schedule=lambda step: jnp.where(step == 3, jnp.inf, 0.01))
    step = make_step(STUDENT, huge, LossConfig())
    with pytest.raises(AntgmmError, match=r"step 3.*row-3-0.*last good checkpoint: older"):
        train(step, fresh(), data(), steps=4, save=lambda state: pytest.fail("saved"), last_checkpoint="older")


def test_data_that_ends_is_an_error():
    with pytest.raises(AntgmmError, match="ended at step 2 of 4"):
        run(fresh(), itertools.islice(data(), 2), 4)


def test_zero_steps_return_the_state():
    state, metrics = run(fresh(), data(), 0)
    assert state.step == 0
    assert metrics == {}
