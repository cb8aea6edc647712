"""The losses over a teacher's most probable tokens: hand-computed values, the loss over all tokens, and the cache."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from antgmm_jax.errors import AntgmmError
from antgmm_jax.parallel.sharding import make_mesh
from distill import losses, top
from distill.cache import open_cache
from distill.losses import LossConfig
from distill.step import make_loss
from distill.teacher import cached, online
from tests.distill import toy
from tests.distill.cached import KEY, PARAMS, TEACHER, batches, build

RNG = np.random.default_rng(0)
STUDENT = jnp.array(RNG.normal(size=(2, 3, 7)), jnp.float32)
LOGITS = jnp.array(2 * RNG.normal(size=(2, 3, 7)), jnp.float32)


def stored(logits, count, temperature):
    """The tokens as they come out of a cache."""
    return top.unpacked(top.packed(top.largest(logits, count, temperature)), count, temperature)


def test_soft_by_hand():
    teacher = jnp.log(jnp.array([0.5, 0.125, 0.25, 0.125]))
    student = jnp.log(jnp.array([0.25, 0.25, 0.25, 0.25]))
    known = top.largest(teacher, 2, 1.0)
    assert known.tokens.tolist() == [0, 2]
    np.testing.assert_allclose(jnp.exp(known.mass), [0.5, 0.25, 0.25], rtol=1e-6)
    # Classes of 0.5, 0.25, 0.25 against 0.25, 0.25, 0.5: 0.5 log 2 + 0 - 0.25 log 2; reversed: -0.25 log 2 + 0.5 log 2.
    for direction in ("forward", "reverse"):
        np.testing.assert_allclose(top.soft(student, known, direction=direction), 0.25 * np.log(2), rtol=1e-6)
    hot = top.largest(teacher, 1, 2.0)  # square roots: 0.7071 of 0.7071 + 0.5 + 2 * 0.35355 = 1.9142
    np.testing.assert_allclose(jnp.exp(hot.mass), [0.369398, 0.630602], rtol=1e-5)
    expected = 4 * (0.369398 * np.log(0.369398 / 0.25) + 0.630602 * np.log(0.630602 / 0.75))
    np.testing.assert_allclose(top.soft(student, hot, temperature=2.0), expected, rtol=1e-4)


@pytest.mark.parametrize(("temperature", "direction"), [(1.0, "forward"), (2.5, "forward"), (2.5, "reverse")])
def test_all_tokens_give_the_loss_and_gradient_over_all_tokens(temperature, direction):
    options = {"temperature": temperature, "direction": direction}
    known = top.largest(LOGITS, 7, temperature)
    assert known.mass.shape == (2, 3, 7)
    np.testing.assert_allclose(top.soft(STUDENT, known, **options), losses.soft(STUDENT, LOGITS, **options), atol=1e-5)
    own = jax.grad(lambda x: top.soft(x, known, **options).sum())(STUDENT)
    whole = jax.grad(lambda x: losses.soft(x, LOGITS, **options).sum())(STUDENT)
    np.testing.assert_allclose(own, whole, atol=1e-5)
    read = stored(LOGITS, 7, temperature)  # masses in float16
    np.testing.assert_allclose(top.soft(STUDENT, read, **options), losses.soft(STUDENT, LOGITS, **options), atol=5e-3)


def test_the_loss_grows_with_the_number_of_tokens_up_to_the_loss_over_all():
    values = [top.soft(STUDENT, top.largest(LOGITS, count, 1.0)) for count in range(1, 8)]
    for fewer, more in itertools.pairwise(values):
        assert (np.asarray(more) >= np.asarray(fewer) - 1e-6).all()
    assert (np.asarray(values[0]) >= -1e-6).all()


def test_the_gradient_is_that_of_the_classes():
    torch = pytest.importorskip("torch")
    known = top.largest(LOGITS, 3, 2.0)
    gradient = jax.grad(lambda x: top.soft(x, known, temperature=2.0).sum())(STUDENT)
    student = torch.tensor(np.array(STUDENT)).requires_grad_()
    tokens = torch.tensor(np.array(known.tokens)).long()
    p = torch.softmax(student / 2, -1)
    q = torch.softmax(torch.tensor(np.array(LOGITS)) / 2, -1)
    classes = [torch.cat([x.gather(-1, tokens), 1 - x.gather(-1, tokens).sum(-1, keepdim=True)], -1) for x in (p, q)]
    (4 * (classes[1] * (classes[1] / classes[0]).log()).sum()).backward()
    np.testing.assert_allclose(gradient, student.grad.numpy(), atol=1e-5)


def test_a_student_equal_to_the_teacher_has_no_gradient_also_where_others_have_no_mass():
    sure = jnp.array([[40.0, 0.0, -80.0, -90.0], [0.0, 1.0, 2.0, 3.0]])
    known = top.largest(sure, 2, 1.0)
    value, gradient = jax.value_and_grad(lambda x: top.soft(x, known).sum())(sure)
    np.testing.assert_allclose(value, 0.0, atol=1e-6)
    np.testing.assert_allclose(gradient, 0.0, atol=1e-6)
    read = stored(sure, 2, 1.0)
    assert np.isfinite(jax.grad(lambda x: top.soft(x, read).sum())(-sure)).all()


def test_rank_reads_the_order_alone():
    np.testing.assert_allclose(top.rank(STUDENT, top.largest(LOGITS, 5, 3.0)), losses.rank(STUDENT, LOGITS), rtol=1e-6)


def test_rank_of_a_single_token_is_zero():
    np.testing.assert_array_equal(top.rank(STUDENT, top.largest(LOGITS, 1, 1.0)), np.zeros((2, 3)))


def test_tokens_above_16_bits_and_masses_come_back():
    wide = jnp.array(RNG.normal(size=(2, 70_000)), jnp.float32).at[:, 69_999].set(9.0)
    known, read = top.largest(wide, 3, 1.0), stored(wide, 3, 1.0)
    assert read.tokens.dtype == jnp.int32 and (read.tokens[:, 0] == 69_999).all()
    np.testing.assert_array_equal(read.tokens, known.tokens)
    np.testing.assert_allclose(read.mass, known.mass, rtol=2e-3)
    np.testing.assert_allclose(jnp.exp(read.mass).sum(axis=-1), 1.0, rtol=1e-6)


def test_more_tokens_than_the_vocabulary_and_another_temperature_are_refused():
    with pytest.raises(AntgmmError, match="top = 8: the vocabulary has only 7 tokens"):
        top.largest(LOGITS, 8, 1.0)
    with pytest.raises(AntgmmError, match=r"temperature = 2: .* are for 1$"):
        top.soft(STUDENT, top.largest(LOGITS, 2, 1.0), temperature=2.0)


@pytest.mark.long
@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize("count", [4, toy.VOCAB])
def test_a_cache_gives_the_loss_of_the_online_teachers_tokens(tmp_path, in_memory, count):
    name = top.name_of(count, 2.0)
    build(tmp_path / "cache", names=(name,))
    teacher = cached(TEACHER, PARAMS, open_cache(tmp_path / "cache", key=KEY, names=(name,), in_memory=in_memory))
    assert not jax.tree.leaves(teacher.params)  # the head is not needed
    student = toy.toy(4, 2)
    params, config = student.init(jax.random.key(0)), LossConfig(hard=1.0, soft=1.0, rank=0.5, temperature=2.0)
    known = online(TEACHER, PARAMS)
    known = known._replace(head=lambda params, x: top.largest(TEACHER.head(params, x), count, 2.0))
    for host in batches():
        for chunk in (512, 5):
            values = []
            for source in (teacher, known):
                loss = make_loss(student, config, teacher=source, chunk=chunk)
                values.append(loss(params, {}, toy.device(source.attach(host)), source.params)[1])
            for term in config.terms():
                np.testing.assert_allclose(values[0][term], values[1][term], rtol=5e-3)


def test_a_mesh_gives_the_loss_of_one_device(tmp_path):
    name = top.name_of(4, 1.0)
    build(tmp_path / "cache", names=(name,))
    teacher = cached(TEACHER, PARAMS, open_cache(tmp_path / "cache", key=KEY, names=(name,)))
    student = toy.toy(4, 2)
    loss = make_loss(student, LossConfig(soft=1.0, rank=0.5), teacher=teacher, chunk=2)
    params, host = student.init(jax.random.key(0)), toy.device(teacher.attach(toy.batch(0)))
    run = jax.value_and_grad(lambda params, batch: loss(params, {}, batch, teacher.params)[0])
    value, gradient = run(params, host)
    with jax.set_mesh(make_mesh(data=2, fsdp=2)):
        meshed, other = jax.jit(run)(params, host)
    np.testing.assert_allclose(meshed, value, rtol=1e-5)
    jax.tree.map(lambda one, two: np.testing.assert_allclose(one, two, atol=1e-5), gradient, other)


def test_a_row_takes_six_bytes_a_token_and_no_padding(tmp_path):
    name = top.name_of(4, 1.0)
    build(tmp_path / "cache", names=(name,))
    cache = open_cache(tmp_path / "cache", key=KEY, names=(name,))
    assert cache.shapes == {name: (toy.ANSWERS, 4 * 2 + 5)}
    rows = cache.rows(toy.batch(0))[name]
    assert rows.dtype == np.uint16 and not rows[toy.batch(0)["targets"] < 0].any()
    build(tmp_path / "cache", names=("final",))  # replaces it
    with pytest.raises(AntgmmError, match="lacks top/4/1.0: it holds final"):
        open_cache(tmp_path / "cache", key=KEY, names=(name,))
