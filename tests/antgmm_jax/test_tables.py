"""Rows of a table on eight devices equal those on one, and no device gathers the table."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from antgmm_jax.blocks.tables import rows_of
from antgmm_jax.parallel import sharding
from antgmm_jax.parallel.sharding import make_mesh, place
from experiments.lab.planning.collectives import sent

VOCAB, WIDTH, AXES = 64, 16, ("vocab", "text/embed")


def problem(rows, length=5):
    keys = jax.random.split(jax.random.key(rows), 3)
    table = jax.random.normal(keys[0], (VOCAB, WIDTH))
    ids = jax.random.randint(keys[1], (rows, length), 0, VOCAB)
    return place(table, AXES), place(ids, ("batch",)), jax.random.normal(keys[2], (rows, length, WIDTH))


def program(table, ids, weights):
    def total(table):
        rows = rows_of(table, "vocab", ids)
        # Not linear: a CPU would run the exchange of the gradient in any order with that of the rows.
        return jnp.vdot(rows * rows / 2, weights), rows

    (_, rows), gradient = jax.value_and_grad(total, has_aux=True)(table)
    return rows, place(gradient, AXES)


def compiled(*given):
    """The program, traced anew: JAX keeps what it has traced for another platform."""
    return jax.jit(lambda *given: program(*given)).lower(*given).compile()


@pytest.fixture(params=["cpu", "tpu"])
def platform(request, monkeypatch):
    """The platform that the program is traced for; it runs on a CPU."""
    monkeypatch.setattr(sharding, "platform", lambda: request.param)
    return request.param


@pytest.mark.parametrize("mesh", [{"fsdp": 8}, {"data": 2, "fsdp": 4}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str)
@pytest.mark.parametrize("rows", [16, 3])
@pytest.mark.usefixtures("platform")
def test_rows_and_gradients_equal_those_of_one_device(mesh, rows):
    table, ids, weights = problem(rows)
    gradient = np.zeros((VOCAB, WIDTH))
    np.add.at(gradient, np.asarray(ids), np.asarray(table[ids] * weights, np.float64))
    with jax.set_mesh(make_mesh(**mesh)):
        given = problem(rows)
        actual = compiled(*given)(*given)
        assert actual[1].sharding.is_equivalent_to(given[0].sharding, 2)
    np.testing.assert_array_equal(actual[0], np.asarray(table)[np.asarray(ids)])
    np.testing.assert_allclose(actual[1], gradient, rtol=1e-5, atol=1e-5)


def test_a_table_in_bfloat16_gets_a_gradient_that_is_summed_in_float32():
    with jax.set_mesh(make_mesh(data=2, fsdp=4)):
        table, ids, weights = problem(8, length=600)
        table, ids, weights = jnp.ones_like(table, jnp.bfloat16), ids % 2, jnp.ones_like(weights, jnp.bfloat16)
        rows, gradient = compiled(table, ids, weights)(table, ids, weights)
    assert rows.dtype == gradient.dtype == jnp.bfloat16
    # In bfloat16 the sum of ones would stop at 256.
    np.testing.assert_allclose(gradient[:2].sum(0).astype(jnp.float32), 8 * 600, rtol=1e-2)


def test_what_devices_send_does_not_depend_on_the_vocabulary(platform):
    with jax.set_mesh(make_mesh(fsdp=8)):
        text = compiled(*problem(8)).as_text()
    assert not re.findall(rf"f32\[{VOCAB},{WIDTH}\]", text)
    # The ids once, and columns for rows there and back; on a CPU the rows of all devices, and the devices' numbers.
    rows, numbers = {"cpu": (8, 8), "tpu": (1, 0)}[platform]
    assert sum(sent(text, 8).values()) <= 7 / 8 * 4 * (8 * 5 + numbers + 2 * rows * 5 * WIDTH)


def test_no_program_for_a_cpu_has_an_all_to_all():
    """XLA's CPU devices run it in any order among other collectives, and wait for one another for ever."""
    with jax.set_mesh(make_mesh(data=2, fsdp=2, tensor=2)):
        assert "all-to-all" not in compiled(*problem(8)).as_text()
