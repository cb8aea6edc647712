"""Gathers on small arrays by hand, and cuts of whole models."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from antgmm_jax.axes import sizes
from antgmm_jax.families.blip2.frequency import every, with_every
from antgmm_jax.pure import abstract
from pruning.keep import compose, identity
from pruning.shrinking import shrink, take
from tests.families.keeps import random_keep
from tests.pruning.models import CONFIGS, parameters


def index(*values):
    return np.array(values, np.int32)


def test_take_gathers_a_shared_axis_in_every_array():
    tree = {"a": np.array([10.0, 11.0, 12.0, 13.0]), "b": np.arange(8.0).reshape(2, 4)}
    axes = {"a": ("t/embed",), "b": ("vocab", "t/embed")}
    out = take(tree, axes, {"t/embed": index(1, 3)})
    np.testing.assert_array_equal(out["a"], [11.0, 13.0])
    np.testing.assert_array_equal(out["b"], [[1.0, 3.0], [5.0, 7.0]])


def test_take_gathers_each_layer_by_its_own_row_and_then_the_layers():
    tree, axes = {"w": np.arange(12.0).reshape(3, 4)}, {"w": ("t/layers", "t/mlp")}
    rows = index([0, 1], [1, 2], [0, 3])
    np.testing.assert_array_equal(take(tree, axes, {"t/mlp": rows})["w"], [[0, 1], [5, 6], [8, 11]])
    out = take(tree, axes, {"t/mlp": rows, "t/layers": index(0, 2)})
    np.testing.assert_array_equal(out["w"], [[0, 1], [8, 11]])


def test_take_does_not_read_the_rows_of_dropped_layers():
    tree, axes = {"w": np.arange(4.0).reshape(2, 2)}, {"w": ("t/layers", "t/mlp")}
    out = take(tree, axes, {"t/mlp": index([-1], [0]), "t/layers": index(1)})
    np.testing.assert_array_equal(out["w"], [[2.0]])


def test_take_gathers_two_axes_of_one_array():
    w = np.arange(24.0).reshape(2, 3, 4)
    keep = {"t/embed": index(0, 2), "t/heads": index([1, 3], [0, 2])}
    out = take({"w": w}, {"w": ("t/layers", "t/embed", "t/heads")}, keep)["w"]
    np.testing.assert_array_equal(out, np.stack([w[0][[0, 2]][:, [1, 3]], w[1][[0, 2]][:, [0, 2]]]))


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.int8])
def test_take_keeps_dtype_and_kind_of_array(dtype):
    w, axes = np.arange(4).astype(dtype), {"w": ("t/embed",)}
    on_host, on_device = (
        take({"w": w}, axes, {"t/embed": index(2)}),
        take({"w": jnp.asarray(w)}, axes, {"t/embed": index(2)}),
    )
    assert isinstance(on_host["w"], np.ndarray)
    assert isinstance(on_device["w"], jax.Array)
    assert on_host["w"].dtype == on_device["w"].dtype == dtype


def test_take_compiles_with_the_keep_as_an_argument():
    axes = {"w": ("t/layers", "t/mlp")}
    keep = {"t/layers": index(1), "t/mlp": index([0, 1], [1, 3])}
    out = jax.jit(lambda tree, keep: take(tree, axes, keep))({"w": np.arange(8.0).reshape(2, 4)}, keep)
    np.testing.assert_array_equal(out["w"], [[5.0, 7.0]])


@pytest.mark.parametrize("family", CONFIGS)
def test_the_small_model_has_the_shapes_of_its_config(family):
    config, params = CONFIGS[family], parameters(family)
    keep = {axis: rows[..., -(-rows.shape[-1] // 2) :] for axis, rows in identity(config).items()}
    smaller, cut = shrink(config, params, keep)
    assert sizes(smaller) == {axis: rows.shape[-1] for axis, rows in keep.items()}
    assert jax.tree.map(lambda x: x.shape, cut) == jax.tree.map(lambda x: x.shape, abstract(smaller))


def test_q_former_cross_layers_follow_the_layers():
    config, params = CONFIGS["blip2_t5"], parameters("blip2_t5")
    heads = index([0, 1], [0, 1], [1, 2], [0, 1])
    smaller, cut = shrink(config, params, {"bridge/layers": index(2, 3), "bridge/cross_heads": heads})
    assert every(smaller) == 2
    before, after = (p["bridge"]["stack"]["cross"]["attention"]["k"] for p in (params, cut))
    np.testing.assert_array_equal(after, before[[1]][:, :, [1, 2]])
    only_cross, cut = shrink(config, params, {"bridge/layers": index(0, 2)})
    assert every(only_cross) == 1
    assert jax.tree.map(jnp.shape, cut) == jax.tree.map(lambda x: x.shape, abstract(with_every(only_cross, 1)))


HALF = {
    "blip2_t5": {"vision/layers": 2, "vision/mlp": 9, "bridge/layers": 2, "bridge/cross_heads": 2, "text/embed": 11,
                 "encoder/heads": 2, "decoder/layers": 2, "decoder/cross_heads": 2},
    "llava": {"vision/layers": 2, "vision/heads": 2, "text/layers": 2, "text/mlp": 9, "text/embed": 17,
              "bridge/mlp": 18},
}  # fmt: skip
QUARTER = {
    "blip2_t5": {"vision/layers": 1, "vision/mlp": 4, "bridge/mlp": 7, "bridge/cross_heads": 1, "text/embed": 5,
                 "decoder/cross_heads": 1, "decoder/mlp": 5},
    "llava": {"vision/layers": 1, "vision/heads": 1, "text/layers": 1, "text/mlp": 4, "text/embed": 9, "vision/mlp": 3},
}  # fmt: skip


@pytest.mark.parametrize("family", CONFIGS)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_two_cuts_equal_the_composed_cut_from_the_teacher(family, seed):
    teacher, params = CONFIGS[family], parameters(family)
    first = random_keep(teacher, HALF[family], seed)
    student, cut = shrink(teacher, params, first)
    second = random_keep(student, QUARTER[family], seed)
    once = compose(identity(teacher), first)
    config, twice = shrink(student, cut, second)
    composed, direct = shrink(teacher, params, compose(once, second))
    assert config == composed
    jax.tree.map(np.testing.assert_array_equal, twice, direct)
    # Composition is associative: the second cut may be described from the first, or from the teacher.
    relative = compose(identity(teacher), compose(once, second))
    jax.tree.map(np.testing.assert_array_equal, relative, compose(once, second))
