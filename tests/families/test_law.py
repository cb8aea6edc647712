"""The law of the house: a model with closed gates computes what the shrunk model computes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from antgmm_jax.axes import sizes
from pruning import gates_of, identity, ones, shrink
from tests.families.cases import batch, close, logits
from tests.families.strategies import fewer, keeps

GROUPS = ("layers", "embed", "heads cross_heads", "mlp", "")
"""Axes that are cut together, by their local names; the last are all axes. Few shapes, so few compilations."""


def gated(case, keep):
    return logits(case.config, case.params, batch(case.config), {**ones(case.config), **gates_of(keep, case.config)})


def assert_law(case, keep):
    close(gated(case, keep), logits(*shrink(case.config, case.params, keep), batch(case.config)))


@pytest.mark.parametrize("group", GROUPS, ids=lambda names: names or "all")
@settings(max_examples=5, deadline=None)
@given(data=st.data())
def test_a_cut_computes_what_closed_gates_do(first, group, data):
    """Counts are not tied here: also shapes that no file describes. Cuts of every shape that is: `test_files`."""
    assert_law(first, data.draw(keeps(first.config, fewer(first.config, 0.7, *group.split()))))


def test_open_gates_change_nothing(case):
    arrays = batch(case.config)
    expected = logits(case.config, case.params, arrays)
    close(gated(case, identity(case.config)), expected)


def test_a_wrong_unit_would_be_seen(case):
    """The comparison can fail: closing one other unit of any axis moves the logits far past the tolerance."""
    whole = identity(case.config)
    for axis, size in sizes(case.config).items():
        if size > 1:
            one, other = (gated(case, {axis: np.delete(whole[axis], drop, axis=-1)}) for drop in (0, size - 1))
            assert np.abs(one - other).max() > 1e-3 * np.abs(one).max(), axis
