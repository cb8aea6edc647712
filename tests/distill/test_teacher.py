"""Cached targets equal the online teacher's up to bfloat16; a stale, damaged or poor cache is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from antgmm_jax.errors import AntgmmError
from distill import cache as cache_module
from distill.align import Part
from distill.cache import build_cache, cache_size, fingerprint, open_cache
from distill.losses import LossConfig
from distill.step import make_loss
from distill.teacher import cached, online
from tests.distill import toy

TEACHER, STUDENT = toy.toy(6, 3), toy.toy(4, 2)
PARAMS = TEACHER.init(jax.random.key(1))
KEY = fingerprint(PARAMS, "data")
LIKE = toy.batch(0)
STATES = ("final", "text/states")


def batches():
    """Eight samples; the second batch is of a shorter bucket."""
    return [toy.batch(0), toy.batch(1, length=5, answers=2)]


def build(directory, *, batches=batches, samples=8, names=("final",), key=KEY, **options):
    build_cache(TEACHER, PARAMS, batches(), directory, samples=samples, like=LIKE, key=key, names=names, **options)


def test_rows_are_the_final_states_at_answer_positions(tmp_path):
    seen = []
    build(tmp_path / "cache", progress=lambda done, samples: seen.append((done, samples)))
    assert seen == [(4, 8), (8, 8)]
    cache = open_cache(tmp_path / "cache", key=KEY)
    host = toy.batch(1, length=5, answers=2)
    final = TEACHER.apply(PARAMS, toy.device(host), collect=("final",))["final"]
    expected = np.take_along_axis(np.asarray(final), host["positions"][..., None], axis=1)
    shuffled = {name: x[::-1] for name, x in host.items()}
    rows = cache.rows(shuffled)["final"]
    assert rows.shape == (4, 2, 6)
    np.testing.assert_array_equal(rows, expected[::-1].astype(jnp.bfloat16))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache"]


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


def test_losses_on_states_are_refused_when_the_cache_lacks_them(tmp_path):
    build(tmp_path / "cache")
    with pytest.raises(AntgmmError, match=r"lacks text/states.*holds final"):
        open_cache(tmp_path / "cache", key=KEY, names=STATES)
    teacher = cached(TEACHER, PARAMS, open_cache(tmp_path / "cache", key=KEY))
    with pytest.raises(AntgmmError, match=r"lacks text/states.*online"):
        teacher.select(STATES)


def test_a_stale_or_absent_or_damaged_cache_is_refused(tmp_path):
    build(tmp_path / "cache")
    changed = jax.tree.map(lambda x: x.at[(0,) * x.ndim].add(1e-3), PARAMS)
    for key in (fingerprint(changed, "data"), fingerprint(PARAMS, "other data")):
        with pytest.raises(AntgmmError, match="another teacher or other data"):
            open_cache(tmp_path / "cache", key=key)
    with pytest.raises(AntgmmError, match="no teacher cache"):
        open_cache(tmp_path / "nothing", key=KEY)
    file = tmp_path / "cache" / "final.npy"
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(AntgmmError, match="damaged"):
        open_cache(tmp_path / "cache", key=KEY)


def test_a_stale_cache_is_replaced_and_a_fresh_one_left(tmp_path):
    build(tmp_path / "cache", key="old")
    build(tmp_path / "cache")
    assert open_cache(tmp_path / "cache", key=KEY).arrays["final"].shape == (8, 3, 6)
    build(tmp_path / "cache", batches=lambda: (pytest.fail("a complete cache was built again") for _ in range(1)))


def test_an_interrupted_build_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "FLUSH_EVERY", 1)

    def broken():
        yield toy.batch(0)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "cache", batches=broken)
    assert not (tmp_path / "cache").exists()
    poisoned = toy.batch(0) | {"positions": np.full((4, 3), 10**6, np.int32)}  # its rows are in: it is not run again
    build(tmp_path / "cache", batches=lambda: [poisoned, toy.batch(1)])
    build(tmp_path / "whole", batches=lambda: [toy.batch(0), toy.batch(1)])
    for name in ("final.npy", "meta.json"):
        assert (tmp_path / "cache" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_missing_rows_left_padding_and_long_batches_are_refused(tmp_path):
    with pytest.raises(AntgmmError, match="4 of 8 samples"):
        build(tmp_path / "cache", batches=lambda: [toy.batch(0)])
    padded = toy.batch(1)
    padded["attention_mask"][0, 0] = 0
    with pytest.raises(AntgmmError, match="left"):
        build(tmp_path / "left", batches=lambda: [toy.batch(0), padded], names=STATES)
    build(tmp_path / "cache")
    cache = open_cache(tmp_path / "cache", key=KEY)
    with pytest.raises(AntgmmError, match="holds 3 positions"):
        cache.rows(toy.batch(0, answers=4))
    with pytest.raises(AntgmmError, match="8 samples"):
        cache.rows(toy.batch(2))


def test_size_is_told_before_anything_is_computed(tmp_path):
    size = cache_size(TEACHER, PARAMS, LIKE, samples=8, names=STATES)
    assert size == {"final": 2 * 8 * 3 * 6, "text/states": 2 * 8 * 4 * toy.LENGTH * 6}
    build(tmp_path / "cache", names=STATES)
    arrays = open_cache(tmp_path / "cache", key=KEY, names=STATES).arrays
    assert {name: array.nbytes for name, array in arrays.items()} == size
