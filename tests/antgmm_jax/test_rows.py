"""Sums over rows on eight devices equal those on one; weights cross the links once, or stay where they are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from antgmm_jax.parallel import sharding
from antgmm_jax.parallel.rows import by_columns, sum_over_rows
from antgmm_jax.parallel.sharding import make_mesh, place
from distill.chunked import answer_sums
from distill.losses import LossConfig
from experiments.lab.planning.collectives import sent
from tests.distill.test_chunked import problem

CONFIG = LossConfig(hard=1.0, soft=0.7, pair=0.3, rank=0.2, temperature=2.0)
NAMES = ("text/embed", "vocab")


def total(kernel, hidden, frozen, theirs, targets, *, chunk, dtype=jnp.float32, apart=""):
    def sums(weights, rows, _):
        hidden, targets, theirs = rows
        heads = [lambda h: h @ weights[0].astype(dtype), lambda h: h @ weights[1]]
        if apart:
            heads = [by_columns(head, kernel.shape[1]) for head in heads]
        return answer_sums(CONFIG, heads[0], hidden, targets, heads[1], theirs, chunk=chunk)

    options = {"dtypes": [dtype, jnp.float32], "padding": (0, -100, 0), "apart": apart}
    terms = sum_over_rows(sums, [kernel, frozen], [NAMES] * 2, (hidden, targets, theirs), (), **options)
    return sum(getattr(CONFIG, name) * value for name, value in terms.items())


def arguments(tokens, *, width=6, vocab=16):
    hidden, kernel, theirs, frozen, targets = problem(tokens, vocab, width)
    return place(kernel, NAMES), hidden, place(frozen, NAMES), theirs, targets


def program(chunk, **options):
    return jax.jit(jax.value_and_grad(lambda *given: total(*given, chunk=chunk, **options), argnums=(0, 1)))


@pytest.mark.parametrize("tokens", [64, 53], ids=["even", "padded"])
@pytest.mark.parametrize("chunk", [3, 512])
def test_values_and_gradients_equal_those_of_one_device(tokens, chunk):
    expected = program(512)(*arguments(tokens))
    with jax.set_mesh(make_mesh(data=2, fsdp=2, tensor=2)):
        given = arguments(tokens)
        actual = program(chunk)(*given)
        assert actual[1][0].sharding.is_equivalent_to(given[0].sharding, 2)
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("width", [8, 6], ids=["split", "whole"])
@pytest.mark.parametrize("vocab", [16, 18], ids=["divisible", "padded"])
@pytest.mark.parametrize("chunk", [3, 512])
def test_weights_that_stay_split_have_equal_values_and_gradients(width, vocab, chunk):
    sizes = {"width": width, "vocab": vocab}
    expected = program(512)(*arguments(53, **sizes))
    with jax.set_mesh(make_mesh(data=2, fsdp=4)):
        given = arguments(53, **sizes)
        actual = program(chunk, apart="vocab")(*given)
        assert actual[1][0].sharding.is_equivalent_to(given[0].sharding, 2)
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_no_device_has_all_of_a_head_that_stays_split(monkeypatch):
    """Neither of the student's, nor of its gradient, nor of the teacher's; a CPU exchanges parts by a gather."""
    monkeypatch.setattr(sharding, "platform", lambda: "tpu")
    with jax.set_mesh(make_mesh(fsdp=8)):
        given = arguments(16, width=64, vocab=4096)
        whole, parts = (program(64, apart=apart).lower(*given).compile().memory_analysis() for apart in ("", "vocab"))
    head = 4 * 64 * 4096
    assert parts.temp_size_in_bytes < head < whole.temp_size_in_bytes


def test_what_devices_send_does_not_depend_on_the_number_of_chunks():
    with jax.set_mesh(make_mesh(fsdp=8)):
        given = arguments(512, width=64, vocab=128)
        one, many = (sent(program(chunk).lower(*given).compile().as_text(), 8) for chunk in (64, 4))
    assert one == many
    # Both kernels are gathered once, and the gradient of one is summed and split.
    assert sum(one.values()) < 1.1 * 7 / 8 * 4 * 128 * (64 + 64 + 66)


def test_weights_are_sent_in_the_dtype_of_computation():
    with jax.set_mesh(make_mesh(fsdp=8)):
        kernel, *rest = arguments(512, width=64, vocab=128)
        text = program(64, dtype=jnp.bfloat16).lower(kernel, *rest).as_text()
    assert "all_gather" in text
    gathers = [line for line in text.splitlines() if '"stablehlo.all_gather"' in line]
    assert gathers
    assert all("xbf16>" in line for line in gathers if "64x128" in line)
