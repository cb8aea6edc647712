"""The flash kernel for TPUs equals plain attention in Pallas' interpreter, and compiles into programs for TPUs."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from antgmm_jax.blocks import attention, flash, windows
from antgmm_jax.blocks.attention import attend
from antgmm_jax.blocks.block import Block, Context
from antgmm_jax.blocks.language import Embedded, LanguageModel
from antgmm_jax.blocks.rope import rope
from antgmm_jax.blocks.stack import rematerialised
from antgmm_jax.blocks.windows import Windows
from antgmm_jax.config import towers
from antgmm_jax.parallel.sharding import MESH, make_mesh
from antgmm_jax.presets import preset
from tests.marks import long
from tests.modules import split

ROWS, LENGTH = 2, 150


def inputs(heads, groups, width, *, rows=ROWS, keys=LENGTH):
    rng = np.random.default_rng(0)
    shapes = [(rows, LENGTH, heads, width), (rows, groups, keys, width), (rows, groups, keys, width)]
    return [jnp.array(rng.normal(size=shape), jnp.bfloat16) for shape in shapes]


def masks(case, rows=ROWS, keys=LENGTH):
    if case == "padding":
        lengths = np.linspace(keys // 3, keys - 10, rows).astype(int)
        return {"mask": jnp.array(np.arange(keys)[None] < lengths[:, None])[:, None, None]}
    if case == "packed":
        segments = jnp.array(np.sort(np.random.default_rng(1).integers(1, 4, (rows, LENGTH)), axis=1))
        return {"segments": segments}
    return {}


def result_and_gradients(given, **options):
    """The attention with its gradients, in float32."""
    value, back = jax.vjp(lambda *qkv: attend(*qkv, scale=0.25, **options), *given)
    return [np.asarray(x, np.float32) for x in (value, *back(jnp.cos(value)))]


@pytest.fixture
def interpreted(monkeypatch):
    monkeypatch.setattr(attention, "platform", lambda: "tpu")
    monkeypatch.setattr(flash, "_FEWEST_KEYS", 1)
    monkeypatch.setattr(splash, "make_splash_mha", partial(splash.make_splash_mha, interpret=True))


CASES = [
    ("padding", True, (2, 1, 32), LENGTH),
    long("packed", True, (2, 2, 16), LENGTH),
    ("packed", False, (2, 2, 16), LENGTH),
    long("none", False, (2, 2, 128), 260),
]


@pytest.mark.parametrize(("case", "causal", "heads", "keys"), CASES)
def test_values_and_gradients_equal_plain_attention(request, case, causal, heads, keys):
    given, options = inputs(*heads, keys=keys), {"causal": causal, **masks(case, keys=keys)}
    exact = [x.astype(jnp.float32) for x in given]
    expected = result_and_gradients(exact, **options)
    request.getfixturevalue("interpreted")
    actual = result_and_gradients(given, **options)
    for one, other in zip(actual, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=0.02 * np.abs(other).max())


@pytest.mark.parametrize(("case", "causal", "heads", "keys"), CASES)
def test_several_blocks_and_separate_backward_passes_give_the_same(request, monkeypatch, case, causal, heads, keys):
    monkeypatch.setattr(flash, "_MOST_COPIES", 0)
    for name in ("_SMALLEST_BLOCK", "_LARGEST_BLOCK"):  # 150 positions are padded to 256, 260 to 512
        monkeypatch.setattr(flash, name, 128 if keys == LENGTH else 256)
    test_values_and_gradients_equal_plain_attention(request, case, causal, heads, keys)


def test_pieces_of_windows_go_through_the_kernel(request, monkeypatch):
    given, images = inputs(2, 2, 16), jnp.zeros((ROWS, LENGTH), jnp.int32)
    segments = jnp.array(np.sort(np.random.default_rng(1).integers(0, 20, (ROWS, LENGTH)), axis=1), jnp.int32)
    expected = result_and_gradients([x.astype(jnp.float32) for x in given], segments=segments)
    request.getfixturevalue("interpreted")
    monkeypatch.setattr(windows, "platform", lambda: "tpu")
    monkeypatch.setattr(windows, "pay", lambda *_: True)
    kernel, shapes = flash.attend, set()

    def noted(q, k, *rest, **options):
        shapes.add((q.shape, k.shape))
        return kernel(q, k, *rest, **options)

    monkeypatch.setattr(flash, "attend", noted)
    actual = result_and_gradients(given, segments=images, windows=Windows(segments, 16))
    # Two pieces of 128 queries a row, with the keys of a window before and after; the other branch takes whole rows.
    assert shapes == {((4, 128, 2, 16), (4, 2, 160, 16)), ((2, LENGTH, 2, 16), (2, 2, LENGTH, 16))}
    for one, other in zip(actual, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=0.02 * np.abs(other).max())


@pytest.mark.long
def test_each_device_computes_its_rows_and_heads(request):
    given, options = inputs(4, 2, 16, rows=4), {"causal": True, **masks("padding", rows=4)}
    expected = result_and_gradients([x.astype(jnp.float32) for x in given], **options)
    request.getfixturevalue("interpreted")
    with jax.set_mesh(make_mesh(data=2, fsdp=2, tensor=2)):
        actual = result_and_gradients(given, **options)
    for one, other in zip(actual, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=0.02 * np.abs(other).max())


@pytest.mark.long
@pytest.mark.parametrize(("case", "causal"), [("padding", True), ("packed", False), ("none", False)])
def test_a_block_pads_its_positions_for_the_kernel(request, case, causal):
    tower = towers(preset("llava-tiny"))["text"]
    rng = np.random.default_rng(0)
    x = jnp.array(rng.normal(size=(ROWS, LENGTH, tower.stack.embed)), jnp.bfloat16)
    angles = rope(jnp.broadcast_to(jnp.arange(LENGTH), (ROWS, LENGTH)), tower.stack.head_dim, 1e4)
    context = Context(causal=causal, positions=angles, **masks(case))
    (graph, params), traces = split(Block(tower)), []

    def result(dtype):
        def run(params, x):
            # Queries that are padding see other keys in the kernel.
            return nnx.merge(graph, params)(x, context, {})[0][:, : LENGTH // 3]

        arguments = jax.tree.map(lambda leaf: leaf.astype(dtype), (params, x))
        traces.append(str(jax.make_jaxpr(run)(*arguments)))
        value, back = jax.vjp(run, *arguments)
        return [np.asarray(each, np.float32) for each in jax.tree.leaves((value, back(jnp.cos(value))))]

    expected = result(jnp.float32)
    request.getfixturevalue("interpreted")
    actual = result(jnp.bfloat16)
    assert actual[0].shape == (ROWS, LENGTH // 3, tower.stack.embed)
    for one, other in zip(actual, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=0.04 * np.abs(other).max())
    assert f"bf16[{ROWS},256,{tower.stack.embed}]" in traces[1] and "pallas_call" in traces[1]


@pytest.mark.long
def test_prompts_go_through_the_kernel_into_the_cache(request):
    config, start = preset("llava-tiny"), 20
    (graph, params), traces = split(LanguageModel(config.language, towers(config))), []
    x = jnp.array(np.random.default_rng(0).normal(size=(ROWS, LENGTH, config.language.decoder.embed)), jnp.bfloat16)
    valid = jnp.arange(LENGTH)[None] >= jnp.array([[0], [start]])

    def result(dtype):
        def run(params, x):
            state = nnx.merge(graph, params).prefill(Embedded(x), valid, None, LENGTH + 5)
            return state.logits, [entry[:, :, start:] for entry in jax.tree.leaves(state.caches)]

        arguments = jax.tree.map(lambda leaf: leaf.astype(dtype), (params, x))
        traces.append(str(jax.make_jaxpr(run)(*arguments)))
        return [np.asarray(each, np.float32) for each in jax.tree.leaves(run(*arguments))]

    expected = result(jnp.float32)
    request.getfixturevalue("interpreted")
    actual = result(jnp.bfloat16)
    for one, other in zip(actual, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=0.04 * np.abs(other).max())
    assert traces[1].count("pallas_call") and f"{LENGTH},{LENGTH}" not in traces[1]
    assert all(np.all(entry[:, :, LENGTH - start :] == 0) and entry.any() for entry in actual[1:])


def test_blocks_are_large_and_pad_little():
    assert [flash.block_size(length) for length in (640, 896, 1664, 16_384, 61_312)] == [640, 512, 640, 512, 768]
    for length in (*range(1, 6000), 16_384, 61_312):
        size = flash.block_size(length)
        whole = -(-length // size) * size
        assert size % flash.LANES == 0 and size <= 768 and whole % flash.block_size(whole) == 0
        if length <= 768:
            assert whole == size < length + flash.LANES
        else:
            assert size >= 384 and whole < length + 384 and whole <= 4 / 3 * length


def test_other_cases_stay_with_xla(monkeypatch):
    monkeypatch.setattr(flash, "_FEWEST_KEYS", 1)
    q, k, _ = inputs(2, 2, 16)
    assert flash.supports(q, k, None, None, None)
    pairs = jnp.ones((1, 1, LENGTH, LENGTH), bool)
    assert not flash.supports(q, k, pairs, None, None)  # any pairs of positions
    assert not flash.supports(q, k, None, jnp.ones((1, 2, LENGTH, LENGTH)), None)
    assert not flash.supports(q.astype(jnp.float32), k, None, None, None)
    assert not flash.supports(q[:, :1], k, None, None, None)  # decoding
    monkeypatch.undo()
    assert not flash.supports(q, k, None, None, None)  # too short


@pytest.fixture
def tpus(v5e):
    """A mesh of TPUs that the compiler knows."""
    return Mesh(np.array(v5e).reshape(1, 2, 2), MESH, axis_types=(AxisType.Auto,) * 3)


KERNEL = 'custom_call_target="tpu_custom_call"'


# 16 blocks of 512 keys have two backward passes.
PROGRAMS = [long(640, "none", 2), long(2048, "attention", 2), (2048, "full", 3), long(8192, "none", 3)]


@pytest.mark.parametrize(("length", "remat", "calls"), PROGRAMS)
def test_the_tpu_compiler_takes_the_kernel_and_policies_say_how_often_it_runs(tpus, length, remat, calls):
    def loss(q, k, v):
        def layer(q, _):
            return attend(jnp.sin(q), k, v, scale=0.1, causal=True), None

        return jnp.sum(jax.lax.scan(rematerialised(layer, remat), q, length=3)[0].astype(jnp.float32) ** 2)

    with jax.set_mesh(tpus):
        rows = NamedSharding(tpus, PartitionSpec("fsdp"))
        q, k = (
            jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=rows)
            for shape in ((4, length, 4, 64), (4, 2, length, 64))
        )
        program = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(q, k, k).lower().compile()
    text = program.as_text()
    assert text.count(KERNEL) == calls  # forward, perhaps again, and backward
    assert f"{length},{length}" not in text
