"""Attention in blocks equals attention to all pairs at once, and its memory grows linearly with a row's patches."""

from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from antgmm_jax.blocks import blocked
from antgmm_jax.blocks.attention import attend
from antgmm_jax.blocks.grids import places
from antgmm_jax.blocks.packed import PackedEncoder, PackedVisionConfig
from antgmm_jax.config import towers
from antgmm_jax.parallel.sharding import make_mesh
from antgmm_jax.presets import preset
from tests.modules import split

SIZES = ([(3, 5), (4, 4), (1, 2)], [(5, 3)])  # rows and columns of squares of each image of two rows
SLOTS = 36
MODEL = preset("qwen2.5-vl-tiny")


@pytest.fixture
def small_blocks(monkeypatch):
    def use():
        monkeypatch.setattr(blocked, "LARGEST", 0)
        monkeypatch.setattr(blocked, "_BLOCK", 16)
        monkeypatch.setattr(blocked, "_QUERIES", 16)

    return use


def encoder(local):
    stack = replace(MODEL.vision.stack, layers=len(local), local_layers=tuple(np.flatnonzero(local).tolist()))
    model = replace(MODEL, vision=replace(MODEL.vision, stack=stack))
    assert isinstance(model.vision, PackedVisionConfig)
    return PackedEncoder(model.vision, towers(model)["vision"])


def gradient(graph, images):
    """The gradient function of an encoder, which returns its states too."""

    def loss(params):
        states = nnx.merge(graph, params)(images, {})[0].reshape(*images["valid"].shape, -1)
        used = jnp.where(images["valid"][..., None], states, 0)
        return jnp.mean(jnp.sin(used)), used

    return jax.grad(loss, has_aux=True)


def close(actual, expected):
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * max(np.abs(other).max(), 1e-3))


def pictures():
    """Images of two rows, some of them with windows of fewer squares, and unused slots."""
    rows = [np.concatenate([places(*size) for size in sizes]) for sizes in SIZES]
    valid, side = np.array([np.arange(SLOTS) < len(row) for row in rows]), MODEL.vision.patch * 2
    pixels = np.random.default_rng(0).normal(size=(2, SLOTS, side, side, 3)).astype(np.float32)
    place = np.stack([np.pad(row, ((0, SLOTS - len(row)), (0, 0))) for row in rows])
    return {"pixels": jnp.array(pixels), "valid": jnp.array(valid), "place": jnp.array(place)}


def test_an_encoder_of_large_pictures_equals_that_of_all_pairs(small_blocks):
    images = pictures()
    graph, params = split(encoder((True, False)))

    def program():
        return jax.jit(gradient(graph, images)).lower(params)

    dense, logits = program(), "f32[2,2,144,144]"
    small_blocks()
    blocks = program()
    assert logits in dense.as_text("hlo") and logits not in blocks.as_text("hlo")
    close(blocks.compile()(params), dense.compile()(params))


def row(heads=(4, 2), rows=2, length=50):
    rng = np.random.default_rng(0)
    shapes = [(rows, length, heads[0], 8), *[(rows, heads[1], length, 8)] * 2]
    segments = jnp.array(np.sort(rng.integers(1, 5, (rows, length)), axis=1), jnp.int32)
    return [jnp.array(rng.normal(size=shape), jnp.float32) for shape in shapes], segments


def result(inputs, run):
    def value(*inputs):
        out = run(*inputs)
        return jnp.sum(jnp.sin(out)), out

    return jax.jit(jax.grad(value, argnums=(0, 1, 2), has_aux=True))(*inputs)


@pytest.mark.parametrize("case", ["row", "causal", "unordered", "devices", "fewer rows than devices"])
def test_blocks_equal_all_pairs(small_blocks, case):
    inputs, segments = row(rows=4 if case == "devices" else 3)
    if case == "unordered":
        segments = jax.random.permutation(jax.random.key(0), segments, axis=1)
    run = partial(attend, scale=0.3, segments=segments, causal=case == "causal")
    expected = result(inputs, run)
    small_blocks()
    with jax.set_mesh(make_mesh(data=2, tensor=2)) if "devices" in case else nullcontext():
        close(result(inputs, run), expected)


@pytest.mark.parametrize("causal", [False, True])
def test_a_kernel_with_a_mask_gets_blocks_of_queries(small_blocks, causal):
    inputs, segments = row()
    expected = result(inputs, partial(attend, scale=0.3, segments=segments, causal=causal))
    small_blocks()
    kernel = partial(attend, scale=0.3)
    close(result(inputs, partial(blocked.by_queries, kernel, segments=segments, causal=causal)), expected)


@pytest.mark.long
@pytest.mark.parametrize("local", [(True, False), (True, True)], ids=str)
def test_memory_grows_linearly_with_the_patches(local):
    def peak(squares):
        images = {"pixels": (1, squares**2, 24, 24, 3), "place": (1, squares**2, 4), "valid": (1, squares**2)}
        dtypes = {"pixels": jnp.uint8, "place": jnp.int32, "valid": jnp.bool_}
        graph, params = nnx.split(encoder(local))
        given = {name: jax.ShapeDtypeStruct(shape, dtypes[name]) for name, shape in images.items()}
        program = jax.jit(lambda params, images: gradient(graph, images)(params)[0]).lower(params, given).compile()
        analysis = program.memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    few, many = peak(48), peak(96)  # 9 216 and 36 864 patches; the logits of all pairs of the latter take 11 GB
    assert many < 4.2 * few and many < 1.5e9
