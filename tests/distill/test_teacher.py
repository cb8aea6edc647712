"""Cached targets equal the online teacher's up to bfloat16, and losses that a cache cannot serve are refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from antgmm_jax.errors import AntgmmError
from distill.align import Part
from distill.cache import open_cache
from distill.losses import LossConfig
from distill.step import make_loss
from distill.teacher import PREFIX, cached, online
from tests.distill import toy
from tests.distill.cached import KEY, PARAMS, STATES, TEACHER, batches, build

STUDENT = toy.toy(4, 2)


@pytest.mark.parametrize("in_memory", [False, True])
def test_cached_loss_equals_online_loss(tmp_path, in_memory):
    build(tmp_path / "cache", names=STATES)
    teacher = cached(TEACHER, PARAMS, open_cache(tmp_path / "cache", key=KEY, names=STATES, in_memory=in_memory))
    config = LossConfig(hard=1.0, soft=1.0, rank=0.5, hidden=0.5)
    part = Part(
        "hidden", "text", "text/states", np.array([0, 2]), np.array([0, 1, 3, 5]), "text/layers", "text/embed",
        lambda batch: batch["attention_mask"] != 0,
    )  # fmt: skip
    student = STUDENT.init(jax.random.key(0))
    for host in batches():
        values = []
        for source in (teacher, online(TEACHER, PARAMS)):
            loss = make_loss(STUDENT, config, teacher=source, parts=(part,))
            values.append(loss(student, {}, toy.device(source.attach(host)), source.params)[1])
        for name in config.terms():
            np.testing.assert_allclose(values[0][name], values[1][name], rtol=2e-2)


def test_a_cached_teacher_keeps_only_what_its_head_reads(tmp_path):
    build(tmp_path / "cache")
    teacher = cached(TEACHER, PARAMS, open_cache(tmp_path / "cache", key=KEY))
    assert [leaf.shape for leaf in jax.tree.leaves(teacher.params)] == [(6, toy.VOCAB)]
    hidden = jnp.ones((2, 6))
    np.testing.assert_allclose(teacher.head(teacher.params, hidden), TEACHER.head(PARAMS, hidden))


def test_a_cached_teacher_holds_its_head_in_the_dtype_of_computation(tmp_path):
    build(tmp_path / "cache")
    teacher = cached(TEACHER, PARAMS, open_cache(tmp_path / "cache", key=KEY), dtype="bfloat16")
    assert [leaf.dtype for leaf in jax.tree.leaves(teacher.params)] == [jnp.bfloat16]
    hidden = jnp.array(np.random.default_rng(0).normal(size=(2, 6)), jnp.float32)
    logits = teacher.head(teacher.params, hidden)
    assert logits.dtype == jnp.bfloat16
    np.testing.assert_allclose(logits.astype(jnp.float32), TEACHER.head(PARAMS, hidden), atol=0.05)


def test_losses_on_states_are_refused_when_the_cache_lacks_them(tmp_path):
    build(tmp_path / "cache")
    with pytest.raises(AntgmmError, match=r"lacks text/states.*holds final"):
        open_cache(tmp_path / "cache", key=KEY, names=STATES)
    teacher = cached(TEACHER, PARAMS, open_cache(tmp_path / "cache", key=KEY))
    with pytest.raises(AntgmmError, match=r"lacks text/states.*online"):
        teacher.select(STATES)


def test_a_cache_of_states_alone_compares_states_and_refuses_logits(tmp_path):
    build(tmp_path / "cache", names=STATES[1:])
    cache = open_cache(tmp_path / "cache", key=KEY, names=STATES[1:])
    assert [*cache.shapes] == ["text/states"]
    teacher = cached(TEACHER, PARAMS, cache)
    assert not jax.tree.leaves(teacher.params)
    teacher.select(STATES[1:])
    with pytest.raises(AntgmmError, match="lacks final: it holds text/states"):
        make_loss(STUDENT, LossConfig(soft=1.0), teacher=teacher)


@pytest.mark.parametrize("in_memory", [False, True])
def test_a_teacher_for_some_states_attaches_no_others(tmp_path, in_memory):
    build(tmp_path / "cache", names=STATES)
    teacher = cached(TEACHER, PARAMS, open_cache(tmp_path / "cache", key=KEY, names=STATES, in_memory=in_memory))
    host = toy.batch(0)
    whole = teacher.attach(host)
    for name in STATES:
        part = teacher.only((name,)).attach(host)
        assert {*part} == {*host, PREFIX + name}
        np.testing.assert_array_equal(part[PREFIX + name], whole[PREFIX + name])
    assert online(TEACHER, PARAMS).only(STATES).attach(host) is host
