"""The law of gates: a model with closed gates gives the logits of the shrunk model."""

import numpy as np
import pytest

from antgmm_jax.axes import sizes
from pruning import gates_of, identity, ones, shrink
from tests.families.cases import batch, close, logits
from tests.families.keeps import fewer, random_keep

GROUPS = ("layers", "embed", "heads cross_heads", "mlp", "")
"""Local names of axes that are cut together; the last group is all axes. Few groups keep compilations few."""


def gated(case, keep):
    return logits(case.config, case.params, batch(case.config), {**ones(case.config), **gates_of(keep, case.config)})


def assert_law(case, keep):
    close(gated(case, keep), logits(*shrink(case.config, case.params, keep), batch(case.config)))


@pytest.mark.parametrize("group", GROUPS, ids=lambda names: names or "all")
def test_a_cut_gives_the_logits_of_closed_gates(first, group):
    """Counts are not tied, so shapes include those that no file describes; `test_files` cuts to legal shapes."""
    counts = fewer(first.config, 0.7, *group.split())
    for seed in range(5):
        assert_law(first, random_keep(first.config, counts, seed))


def test_open_gates_change_nothing(case):
    arrays = batch(case.config)
    expected = logits(case.config, case.params, arrays)
    close(gated(case, identity(case.config)), expected)


def test_a_wrong_unit_changes_the_logits(case):
    """The comparison can fail: closing another unit of any axis moves the logits far beyond the tolerance."""
    whole = identity(case.config)
    for axis, size in sizes(case.config).items():
        if size > 1:
            one, other = (gated(case, {axis: np.delete(whole[axis], drop, axis=-1)}) for drop in (0, size - 1))
            assert np.abs(one - other).max() > 1e-3 * np.abs(one).max(), axis
