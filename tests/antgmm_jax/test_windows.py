"""Attention in windows equals attention with a mask; an encoder's order of windows is not seen outside."""

from contextlib import nullcontext
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from antgmm_jax.blocks import attention, windows
from antgmm_jax.blocks.attention import attend
from antgmm_jax.blocks.grids import by_window, places, reordered
from antgmm_jax.blocks.packed import PackedEncoder
from antgmm_jax.blocks.packing import same_sample
from antgmm_jax.blocks.windows import Windows
from antgmm_jax.parallel.sharding import make_mesh
from tests.antgmm_jax.test_blocked import SIZES, close, encoder, gradient, pictures, result
from tests.modules import split


def row(heads=(4, 2), rows=3, length=57, reach=7):
    """Queries, keys and values, and segments of up to `reach` positions."""
    rng = np.random.default_rng(0)
    shapes = [(rows, length, heads[0], 8), *[(rows, heads[1], length, 8)] * 2]
    lengths = [rng.integers(1, reach + 1, length) for _ in range(rows)]
    segments = jnp.array([np.repeat(np.arange(length), each)[:length] for each in lengths], jnp.int32)
    return [jnp.array(rng.normal(size=shape), jnp.float32) for shape in shapes], segments


@pytest.fixture(params=["blocks", "pieces"])
def way(request, monkeypatch):
    """Attention within windows as on a CPU, and in the pieces of accelerators."""
    if request.param == "blocks":
        monkeypatch.setattr(windows, "BLOCK", 16)
    else:
        for module in (windows, attention):
            monkeypatch.setattr(module, "platform", lambda: "gpu")
        monkeypatch.setattr(windows, "_PIECE", 2)
        monkeypatch.setattr(windows, "_FEWEST", 8)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("length", [56, 57, 70])
@pytest.mark.parametrize("devices", [False, True])
def test_windows_equal_all_pairs(length, devices):
    inputs, segments = row(rows=4, length=length)
    expected = result(inputs, partial(attend, scale=0.3, mask=same_sample(segments, segments)))
    near = Windows(segments, 7)
    assert windows.pay(near, length)
    with jax.set_mesh(make_mesh(data=2, tensor=2)) if devices else nullcontext():
        close(result(inputs, partial(attend, scale=0.3, windows=near, segments=jnp.zeros_like(segments))), expected)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("length", [21, 57])  # too short for windows, and long enough
@pytest.mark.parametrize("used", [False, True])
def test_a_traced_layer_attends_in_windows_or_not(length, used):
    inputs, segments = row(length=length)
    images = jnp.array(segments > 3, jnp.int32)
    seen = segments if used else images
    expected = result(inputs, partial(attend, scale=0.3, mask=same_sample(seen, seen)))

    def run(*inputs):
        layer = jax.lax.optimization_barrier(jnp.array(used))
        return attend(*inputs, scale=0.3, segments=images, windows=Windows(segments, 7, layer))

    close(result(inputs, run), expected)


@pytest.mark.long
@pytest.mark.parametrize("local", [(True, False, True), (True, True)])
def test_an_encoder_of_windows_equals_that_of_masks(monkeypatch, local):
    images = pictures()
    graph, params = split(encoder(local))

    def program():
        return jax.jit(gradient(graph, images)).lower(params)

    near = program()
    monkeypatch.setattr(windows, "pay", lambda *_: False)
    masks = program()
    logits = "f32[2,2,144,144]"
    assert logits in masks.as_text("hlo")
    assert all(local) == (logits not in near.compile().as_text())
    close(near.compile()(params), masks.compile()(params))


def test_the_order_of_windows_by_hand():
    # An image of 3 x 3 squares in windows of 2 x 2, then an unused slot.
    place = jnp.array(np.pad(places(3, 3), ((0, 1), (0, 0))))[None]
    images = {"place": place, "valid": jnp.arange(10)[None] < 9, "pixels": jnp.arange(10)[None]}
    ahead, numbers, back = by_window(images, 2)
    assert ahead["pixels"].tolist() == [[0, 1, 3, 4, 2, 5, 6, 7, 8, 9]]
    assert numbers.tolist() == [[0, 0, 0, 0, 2, 2, 6, 6, 8, -1]]
    assert reordered(ahead["pixels"] * 1.0, back).tolist() == images["pixels"].tolist()
    slopes = jax.grad(lambda x: jnp.sum(reordered(x, back) * jnp.arange(10.0)[None]))(jnp.zeros((1, 10)))
    assert slopes.tolist() == [[0, 1, 3, 4, 2, 5, 6, 7, 8, 9]]


@pytest.mark.parametrize("local", [(True, False), (False, False)])
def test_unused_slots_attend_to_themselves_alone(monkeypatch, local):
    """Their blocks would otherwise take time that grows with the square of their number."""
    seen = []
    numbered = PackedEncoder._by_patch
    monkeypatch.setattr(PackedEncoder, "_by_patch", lambda *given: seen.append(numbered(*given)) or seen[-1])
    images = pictures()
    nnx.merge(*split(encoder(local)))(images, {})
    assert len(seen) == 1 + any(local)
    for numbers in seen:
        unused = np.asarray(numbers[1]).reshape(-1, 4)[~np.asarray(images["valid"][1])]
        assert (np.diff(np.asarray(numbers), axis=1) >= 0).all()
        assert (unused == unused[:, :1]).all() and (np.diff(unused[:, 0]) > 0).all()
        assert unused.min() > np.asarray(numbers[1])[: 4 * 15].max()


def test_images_begin_windows_of_their_own():
    place = jnp.array(np.concatenate([places(*size) for size in SIZES[0]]))[None]
    image = jnp.repeat(jnp.arange(3), jnp.array([15, 16, 2]))[None]
    images = {"place": place, "valid": jnp.ones((1, 33), bool), "image": image}
    ahead, numbers, _ = by_window(images, 2)
    assert ahead["image"].tolist() == image.tolist()
    assert (jnp.diff(numbers) >= 0).all()
