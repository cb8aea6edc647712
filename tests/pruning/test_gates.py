"""Values of gates by hand, and the order in which gates close."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from antgmm_jax.axes import sizes
from antgmm_jax.errors import AntgmmError
from antgmm_jax.pure import local_axes
from pruning.gates import gates_at, gates_of, ones
from pruning.keep import gate_shape
from tests.families.keeps import random_keep
from tests.pruning.models import CONFIGS

LLAVA = CONFIGS["llava"]


def index(*values):
    return np.array(values, np.int32)


def test_ones_have_the_shapes_of_the_axes():
    gates = ones(LLAVA)
    assert {axis: gate.shape for axis, gate in gates.items()} == {
        "vision/layers": (3,), "vision/embed": (24,), "vision/heads": (3, 3), "vision/mlp": (3, 20),
        "text/layers": (3,), "text/embed": (36,), "text/heads": (3, 3), "text/mlp": (3, 20), "bridge/mlp": (36,),
    }  # fmt: skip
    assert all((gate == 1).all() and gate.dtype == np.float32 for gate in gates.values())


def test_gates_of_by_hand():
    keep = {"text/layers": index(0, 2), "text/heads": index([0, 2], [-1, -1], [1, 2])}
    gates = gates_of(keep, LLAVA)
    np.testing.assert_array_equal(gates["text/layers"], [1, 0, 1])
    np.testing.assert_array_equal(gates["text/heads"], [[1, 0, 1], [0, 0, 0], [0, 1, 1]])
    assert sorted(gates) == sorted(keep)


def test_gates_close_the_lowest_scores_first_and_linearly():
    keep = {"text/layers": index(1), "text/heads": index([0], [1], [2])}
    scores = {"text/layers": np.array([0.5, 9.0, 0.1]), "text/heads": np.array([[3, 2, 1], [1, 2, 3], [1, 0, 2]])}
    half = gates_at(keep, scores, LLAVA, 0.5)
    np.testing.assert_array_equal(half["text/layers"], [1, 1, 0])
    np.testing.assert_array_equal(half["text/heads"], [[1, 1, 0], [0, 1, 1], [1, 0, 1]])
    np.testing.assert_array_equal(gates_at(keep, scores, LLAVA, 0.0)["text/layers"], [1, 1, 1])


def test_kept_units_stay_open_with_low_scores():
    keep, scores = {"text/layers": index(0, 1)}, {"text/layers": np.array([0.0, 0.1, 9.0])}
    np.testing.assert_array_equal(gates_at(keep, scores, LLAVA, 1.0)["text/layers"], [1, 1, 0])


@pytest.mark.parametrize("family", CONFIGS)
@settings(max_examples=25, deadline=None)
@given(data=st.data(), seed=st.integers(0, 99))
def test_closing_is_monotone_and_ends_at_gates_of(family, data, seed):
    config = CONFIGS[family]
    present, local, rng = sizes(config), local_axes(config), np.random.default_rng(seed)
    counts = {axis: data.draw(st.integers(1, size)) for axis, size in present.items() if axis != "bridge/layers"}
    keep = random_keep(config, counts, seed)
    # Few distinct values make ties.
    scores = {axis: rng.integers(0, 4, gate_shape(axis, present, local)).astype(np.float32) for axis in present}
    before = {axis: gate for axis, gate in ones(config).items() if axis in keep}
    for step in range(6):
        now = gates_at(keep, scores, config, step / 5)
        for axis, gate in now.items():
            assert (gate <= before[axis]).all(), axis
            removed = present[axis] - counts[axis]
            np.testing.assert_array_equal((gate == 0).sum(-1), removed * step // 5, err_msg=axis)
        before = now
    final = gates_of(keep, config)
    assert all((before[axis] == final[axis]).all() for axis in final)


@pytest.mark.parametrize(
    ("scores", "fraction", "message"),
    [
        ({}, 0.5, "text/layers has no scores"),
        ({"text/layers": np.ones(4)}, 0.5, r"scores have shape \(4,\), expected \(3,\)"),
        ({"text/layers": np.array([1, np.nan, 2])}, 0.5, "1 scores are not finite"),
        ({"text/layers": np.ones(3)}, 1.5, "expected 0 to 1"),
    ],
)
def test_bad_scores_and_fractions_are_refused(scores, fraction, message):
    with pytest.raises(AntgmmError, match=message):
        gates_at({"text/layers": index(0)}, scores, LLAVA, fraction)
