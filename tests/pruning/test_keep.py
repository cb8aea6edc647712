"""Kept indices: validation, composition and merging."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from antgmm_jax.axes import sizes
from antgmm_jax.errors import AntgmmError
from antgmm_jax.families.blip2.frequency import every
from pruning.keep import as_kept, check, compose, identity, merge, shrunk_config
from tests.families.keeps import random_keep
from tests.pruning.models import CONFIGS, EACH

BLIP, LLAVA = CONFIGS["blip2_t5"], CONFIGS["llava"]


def index(*values):
    return np.array(values, np.int32)


def cut_of(config, **axes):
    """A complete keep in the teacher's indices that cuts the given axes ("tower__name")."""
    return compose(identity(config), {name.replace("__", "/"): value for name, value in axes.items()})


def assert_same(a, b):
    assert sorted(a) == sorted(b)
    for axis in a:
        np.testing.assert_array_equal(a[axis], b[axis], err_msg=axis)


def test_identity_holds_every_axis():
    whole = identity(LLAVA)
    assert sorted(whole) == sorted(sizes(LLAVA))
    np.testing.assert_array_equal(whole["text/layers"], [0, 1, 2])
    np.testing.assert_array_equal(whole["text/heads"], [[0, 1, 2]] * 3)
    assert {rows.dtype for rows in whole.values()} == {np.dtype(np.int32)}


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ({"text/mpl": index(0)}, "unknown axis 'text/mpl'"),
        ({"text/embed": index([0])}, "the axis is shared"),
        ({"text/heads": index(0)}, "one row for each of 3 layers"),
        ({"text/embed": index(0, 36)}, r"within 0..35"),
        ({"text/embed": index(1, 0)}, "ascend"),
        ({"text/embed": index(1, 1)}, "ascend"),
        ({"text/embed": np.zeros(0, np.int32)}, "at least one"),
        ({"text/heads": index([0], [-1], [1])}, r"no indices for the kept layers \[1\]"),
    ],
)
def test_invalid_keeps_are_refused(keep, message):
    with pytest.raises(AntgmmError, match=message):
        check(LLAVA, keep)


@pytest.mark.parametrize(
    "values", [None, {}, "x", [0, "a"], [0, [1]], [0, None], [0, 2**32 + 2], [0, 10**30], [-2], [True, False]]
)
def test_what_is_no_list_of_indices_is_refused(values):
    with pytest.raises(AntgmmError, match="kept units are no lists of indices: choose another stage"):
        as_kept(values)


def test_rows_of_dropped_layers_may_be_absent():
    check(LLAVA, {"text/heads": index([0], [-1], [1]), "text/layers": index(0, 2)})


def test_compose_by_hand():
    # First layers 0, 2 and 3 of 4 are kept; then units are cut in each layer, and the middle layer is dropped.
    parent = {"t/layers": index(0, 2, 3), "t/mlp": index(*[[0, 1, 2, 3]] * 4), "t/embed": index(1, 2, 5)}
    keep = {"t/layers": index(0, 2), "t/mlp": index([0, 1], [1, 2], [2, 3]), "t/embed": index(0, 2)}
    out = compose(parent, keep)
    np.testing.assert_array_equal(out["t/layers"], [0, 3])
    np.testing.assert_array_equal(out["t/mlp"], [[0, 1], [-1, -1], [1, 2], [2, 3]])
    np.testing.assert_array_equal(out["t/embed"], [1, 5])
    again = compose(out, {"t/mlp": index([1], [0])})
    np.testing.assert_array_equal(again["t/mlp"], [[1], [-1], [-1], [2]])


def test_compose_leaves_uncut_axes_and_their_rows():
    parent = cut_of(LLAVA, text__layers=index(0, 2))
    out = compose(parent, {"text/heads": index([0, 1, 2], [0, 1, 2])})
    assert_same(out, parent)


def test_compose_names_axes_that_the_parent_lacks():
    with pytest.raises(AntgmmError, match="lacks the axes text/mlp"):
        compose({"text/layers": index(0)}, {"text/mlp": index([0])})


@pytest.mark.parametrize("family", EACH)
@settings(max_examples=25, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**32 - 1))
def test_compose_with_the_identity_changes_nothing(family, data, seed):
    config = CONFIGS[family]
    counts = {axis: data.draw(st.integers(1, size)) for axis, size in sizes(config).items() if axis != "bridge/layers"}
    keep = {**identity(config), **random_keep(config, counts, seed)}
    assert_same(compose(identity(config), keep), keep)
    assert_same(compose(keep, identity(shrunk_config(config, keep))), keep)


def test_merge_takes_each_axis_from_the_source_that_cuts_it():
    blocks = cut_of(LLAVA, text__layers=index(0, 2))
    widths = cut_of(LLAVA, text__mlp=index([0], [1], [2]), vision__mlp=index([3], [4], [5]))
    merged = merge(blocks, widths, config=LLAVA)
    expected = {**identity(LLAVA), "text/layers": index(0, 2), "text/mlp": index([0], [1], [2]),
                "vision/mlp": index([3], [4], [5])}  # fmt: skip
    assert_same(merged, expected)
    assert_same(merged, merge(widths, blocks, config=LLAVA))
    assert_same(merge(config=LLAVA), identity(LLAVA))


def test_merge_refuses_two_sources_for_an_axis_and_names_both():
    one, two = cut_of(LLAVA, text__layers=index(0)), cut_of(LLAVA, text__layers=index(1))
    with pytest.raises(AntgmmError, match="text/layers is pruned in both runs/a and runs/b"):
        merge(one, two, config=LLAVA, names=("runs/a", "runs/b"))
    with pytest.raises(AntgmmError, match="both source 1 and source 2"):
        merge(one, one, config=LLAVA)


def test_merge_refuses_layers_that_a_local_axis_has_no_row_for():
    # The widths come from a model without the first layer; the other source keeps that layer.
    widths = compose(cut_of(LLAVA, text__layers=index(1, 2)), {"text/mlp": index([0], [1])})
    with pytest.raises(AntgmmError, match=r"text/mlp: no indices for the kept layers \[0\]"):
        merge({"text/mlp": widths["text/mlp"]}, cut_of(LLAVA, text__layers=index(0, 2)), config=LLAVA)


def test_merge_checks_tied_counts():
    with pytest.raises(AntgmmError, match=r"not a legal model.*heads"):
        merge(cut_of(BLIP, encoder__heads=index(0, 1)), config=BLIP)


@pytest.mark.parametrize(
    ("layers", "expected"), [([0, 1], 2), ([0, 3], 2), ([2], 2), ([0, 2], 1), ([0, 1, 3], 3), ([0, 1, 2, 3], 2)]
)
def test_kept_layers_determine_the_cross_attention_frequency(layers, expected):
    assert every(shrunk_config(BLIP, {"bridge/layers": index(*layers)})) == expected


@pytest.mark.parametrize("layers", [[1], [1, 2], [0, 2, 3]])
def test_a_cross_attention_pattern_without_a_frequency_is_refused(layers):
    with pytest.raises(AntgmmError, match="no frequency describes"):
        shrunk_config(BLIP, {"bridge/layers": index(*layers)})
