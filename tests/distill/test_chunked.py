"""The chunked loss equals the unchunked one, and its peak memory is far below one [tokens, vocab] array."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill import losses
from distill.chunked import answer_sums, at_positions
from distill.losses import LossConfig
from tests.marks import long

CONFIG = LossConfig(hard=1.0, soft=0.7, pair=0.3, rank=0.2, temperature=2.0)


def problem(tokens: int, vocab: int, width: int = 6):
    rng = np.random.default_rng(0)
    hidden, kernel, theirs, frozen = (
        jnp.array(rng.normal(size=shape), jnp.float32)
        for shape in [(tokens, width), (width, vocab), (tokens, width + 2), (width + 2, vocab)]
    )
    targets = jnp.array(np.where(rng.random(tokens) < 0.3, -100, rng.integers(0, vocab, tokens)))
    return hidden, kernel, theirs, frozen, targets


def total(hidden, kernel, theirs, frozen, targets, chunk, config=CONFIG):
    sums = answer_sums(config, lambda h: h @ kernel, hidden, targets, lambda h: h @ frozen, theirs, chunk=chunk)
    return sum(getattr(config, name) * value for name, value in sums.items()), sums


@pytest.mark.parametrize(
    ("chunk", "direction"),
    [(4, "forward"), (13, "reverse"), *(long(chunk, "forward") for chunk in (1, 7, 13, 64)), long(4, "reverse")],
)
def test_chunked_equals_unchunked_in_value_and_gradient(chunk, direction):
    hidden, kernel, theirs, frozen, targets = problem(13, 17)
    config = dataclasses.replace(CONFIG, direction=direction)

    def plain(hidden, kernel):
        s, t, valid = hidden @ kernel, theirs @ frozen, targets >= 0
        values = {
            "hard": losses.hard(s, targets),
            "soft": losses.soft(s, t, temperature=2.0, direction=direction),
            "pair": losses.pair(s, targets),
            "rank": losses.rank(s, t),
        }
        return sum(getattr(CONFIG, name) * jnp.sum(value * valid) for name, value in values.items())

    expected = jax.value_and_grad(plain, argnums=(0, 1))(hidden, kernel)
    (value, _), gradient = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(
        hidden, kernel, theirs, frozen, targets, chunk, config
    )
    np.testing.assert_allclose(value, expected[0], rtol=1e-5)
    for got, want in zip(gradient, expected[1], strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5, rtol=1e-4)


def test_losses_with_weight_zero_are_not_computed():
    hidden, kernel, _, _, targets = problem(5, 9)

    def no_teacher(hidden):
        raise AssertionError("the teacher's head was called")

    sums = answer_sums(LossConfig(hard=1.0), lambda h: h @ kernel, hidden, targets, no_teacher, jnp.zeros((5, 0)))
    assert set(sums) == {"hard"}


def test_peak_memory_is_far_below_all_logits():
    tokens, vocab, chunk = 2048, 4096, 64
    arguments = problem(tokens, vocab)
    student, rest = arguments[:2], arguments[2:]

    def peak(chunk):
        step = jax.jit(jax.grad(lambda student, rest: total(*student, *rest, chunk)[0]))
        analysis = step.lower(student, rest).compile().memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    all_logits = 4 * tokens * vocab
    assert peak(chunk) < all_logits / 4
    assert peak(tokens) > all_logits  # the measure detects the memory that chunks avoid


def test_at_positions_by_hand():
    final = jnp.arange(12.0).reshape(2, 3, 2)
    got = at_positions(final, jnp.array([[2, 0], [1, 1]]))
    np.testing.assert_array_equal(got, [[[4.0, 5.0], [0.0, 1.0]], [[8.0, 9.0], [8.0, 9.0]]])
