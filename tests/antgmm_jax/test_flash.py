"""Attention uses cuDNN's flash kernel where possible (in programs lowered for CUDA) and equals JAX's everywhere."""

import re
from collections import Counter
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from antgmm_jax import decoding
from antgmm_jax.blocks import attention, blocked
from antgmm_jax.blocks.attention import attend
from antgmm_jax.pure import abstract, functional
from distill import LossConfig, make_loss
from tests.marks import long
from tests.pruning.models import CONFIGS

PLAIN, BIASED = "fmhaSoftmax", "fmhaScaleBiasSoftmax"
SHAPE = jax.ShapeDtypeStruct


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(attention, "widest_for_cudnn", lambda: 128)
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)


def calls(function, *arguments) -> Counter[str]:
    """Counts of cuDNN calls, and of XLA's exponentials by shape, in a program lowered for CUDA."""
    text = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    exponentials = re.findall(r"stablehlo.exponential .*tensor<(\w+)xf32>", text)
    return Counter(re.findall(r"__cudnn\$(\w+)", text)) + Counter(exponentials)


def batch(config, *, prompt, answer):
    t5, image = config.language.encoder is not None, config.vision.image
    lengths = {"input_ids": prompt, "attention_mask": prompt, "positions": answer, "targets": answer}
    lengths |= {"decoder_input_ids": answer} if t5 else {}
    made = {name: SHAPE((2, length), jnp.int32) for name, length in lengths.items()}
    return made | {"images": {"pixels": SHAPE((2, 1, image, image, 3), jnp.float32), "valid": SHAPE((2, 1), jnp.bool_)}}


def of_a_step(config, dtype=jnp.bfloat16, *, prompt=8, answer=4):
    """Counts of attention calls in a loss's gradient; the layers of a stack share one program, without remat."""
    loss = make_loss(functional(config, "none"), LossConfig(), dtype=dtype)
    gradient = jax.grad(lambda params, batch: loss(params, {}, batch, {})[0])
    counts = calls(gradient, abstract(config), batch(config, prompt=prompt, answer=answer))
    # XLA's attention has four dimensions (rows, heads, queries, keys); the loss's softmax has two.
    return {name: count for name, count in counts.items() if "fmha" in name or name.count("x") == 3}


def cudnn(plain, biased):
    counts = {PLAIN: plain, f"{PLAIN}Backward": plain, BIASED: biased, f"{BIASED}Backward": biased}
    return {name: count for name, count in counts.items() if count}


# LLaVA: CLIP has no mask, Llama reads lengths. BLIP-2: the ViT, the Q-Former's two self-attentions and its
# cross-attention have no mask; T5's decoder has a bias, and lengths in cross-attention; T5's encoder has both.
@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("lengths", [{}, {"prompt": 9, "answer": 5}], ids=["even", "odd"])
@pytest.mark.parametrize(("family", "plain", "biased"), [("llava", 2, 0), ("blip2_t5", 5, 2)])
def test_a_bfloat16_step_uses_cudnn_for_all_attention(family, plain, biased, lengths):
    assert of_a_step(CONFIGS[family], **lengths) == cudnn(plain, biased)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(("family", "expected"), [("llava", {PLAIN: 3}), ("blip2_t5", {BIASED: 1})])
def test_bfloat16_prompts_use_cudnn_without_a_mask_of_pairs(family, expected):
    """Llama's three layers, and the program of T5's encoder, whose mask would be broadcast to all pairs."""
    config = CONFIGS[family]
    arrays = batch(config, prompt=8, answer=4)
    arrays = {name: arrays[name] for name in ("input_ids", "attention_mask", "images")}
    params = abstract(config, jnp.bfloat16)
    features = jax.eval_shape(functional(config).features, params, arrays["images"])
    run = decoding.phases(config, 4, (), 0).prefill
    counts = calls(run, params, {**arrays, "vision_features": features})
    assert {name: count for name, count in counts.items() if "fmha" in name} == expected


@pytest.mark.usefixtures("gpu")
def test_xla_computes_float32_and_unsupported_head_widths():
    assert not any("fmha" in name for name in of_a_step(CONFIGS["llava"], jnp.float32))
    for width, flash in ((12, False), (128, True), (136, False)):
        q, k = SHAPE((2, 4, 3, width), jnp.bfloat16), SHAPE((2, 3, 4, width), jnp.bfloat16)
        assert ("fmhaSoftmax" in calls(partial(attend, scale=1.0), q, k, k)) == flash
    one = SHAPE((2, 1, 3, 8), jnp.bfloat16)
    many = SHAPE((2, 3, 4, 8), jnp.bfloat16)
    assert "fmhaSoftmax" not in calls(partial(attend, scale=1.0), one, many, many)


@pytest.mark.parametrize(
    ("capability", "width"), [("7.5", 0), ("8.0", 128), ("8.9", 128), ("9.0", 256), ("10.0", 128), ("12.0", 128)]
)
@pytest.mark.parametrize("version", [(0, 10, 2), (0, 12, 0)])
def test_widths_for_cudnn_follow_its_support_matrix(monkeypatch, capability, width, version):
    monkeypatch.setattr(jax, "__version_info__", version)
    width = min(width, 128) if version < (0, 11, 1) else width
    monkeypatch.setattr(attention, "platform", lambda: "gpu")
    monkeypatch.setattr(attention, "get_backend", lambda: SimpleNamespace(platform_version="cuda 12090"))
    monkeypatch.setattr(jax, "local_devices", lambda: [SimpleNamespace(compute_capability=capability)])
    assert attention.widest_for_cudnn() == width


def test_xla_computes_all_attention_without_a_supported_gpu():
    assert attention.widest_for_cudnn() == 0
    assert not any("fmha" in name for name in of_a_step(CONFIGS["llava"]))


@pytest.mark.usefixtures("gpu")
def test_cudnn_gets_blocks_of_the_queries_of_long_rows_of_segments(monkeypatch):
    monkeypatch.setattr(blocked, "LARGEST", 0)
    monkeypatch.setattr(blocked, "_QUERIES", 16)
    q, k = SHAPE((2, 40, 3, 8), jnp.bfloat16), SHAPE((2, 3, 40, 8), jnp.bfloat16)

    def loss(q, k, segments):
        return jnp.sum(attend(q, k, k, scale=1.0, segments=segments).astype(jnp.float32))

    arguments = (q, k, SHAPE((2, 40), jnp.int32))
    assert calls(jax.grad(loss, argnums=(0, 1)), *arguments)[f"{BIASED}Backward"] == 1
    text = jax.jit(jax.grad(loss)).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert "x16x40x" in text and "x40x40x" not in text


CASES = {
    "plain": {},
    "causal": {"causal": True},
    "keys": {"mask": (2, 1, 1)},
    "causal keys": {"causal": True, "mask": (2, 1, 1)},
    "pairs": {"mask": (2, 1, None)},
    "bias": {"causal": True, "bias": True},
    "lengths": {"lengths": True},
    "causal lengths": {"causal": True, "lengths": True},
    "bias lengths": {"bias": True, "lengths": True},
}


# Only cross-attention has different numbers of keys and queries; it is never causal.
ALIKE = [(case, length, length) for case in CASES for length in (6, 7)]
ACROSS = [(case, *lengths) for case in ("plain", "keys", "lengths") for lengths in ((7, 6), (6, 7), (7, 5))]
HALF = [("keys", 5, 63), ("pairs", 6, 64), ("bias", 64, 64), ("lengths", 6, 64), ("bias lengths", 64, 64)]


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(("case", "length", "keys"), [*ALIKE, *(long(*one) for one in ACROSS + HALF)])
def test_arguments_for_cudnn_describe_the_same_attention(monkeypatch, case, length, keys):
    """XLA's attention on the padded arguments for the flash kernel gives the result of the unpadded ones."""
    rng = np.random.default_rng(0)
    q = jnp.array(rng.normal(size=(2, length, 4, 8)), jnp.bfloat16)
    k, v = (jnp.array(rng.normal(size=(2, keys, 2, 8)), jnp.bfloat16) for _ in range(2))
    given = dict(CASES[case])
    if "mask" in given:
        rows, heads, queries = given["mask"]
        shape = (rows, heads, queries or length, keys)
        given["mask"] = jnp.array(rng.random(shape) < 0.6).at[..., 0].set(True)
    if "bias" in given:
        given["bias"] = jnp.array(rng.normal(size=(1, 4, length, keys)), jnp.bfloat16).astype(jnp.float32)
    tokens = np.full(2, length)
    if given.pop("lengths", False):
        used = np.array([keys, keys - 2])
        masked = {"mask": jnp.array(np.arange(keys) < used[:, None])[:, None, None]}
        tokens = used if given.get("causal") else tokens
        given |= {**masked, "lengths": jnp.array(used)}
    real, seen = jax.nn.dot_product_attention, []

    def by_xla(*arguments, implementation=None, **rest):
        seen.append((implementation, arguments[0].shape[1], arguments[1].shape[1]))
        return real(*arguments, **rest)

    monkeypatch.setattr(jax.nn, "dot_product_attention", by_xla)
    attended = attend(q, k.swapaxes(1, 2), v.swapaxes(1, 2), scale=0.5, **given)
    given.pop("lengths", None)
    expected = real(q, k, v, scale=0.5, is_causal=given.pop("causal", False), **given)
    more = 2 * (keys > 60 and case != "lengths")  # keys that keep the last block of 128 from being half full
    assert seen == [("cudnn", length + length % 2, keys + keys % 2 + more)]
    assert attended.shape == expected.shape == q.shape
    for row, count in enumerate(tokens):
        np.testing.assert_array_equal(
            attended[row, :count].astype(jnp.float32), expected[row, :count].astype(jnp.float32)
        )


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (3, 1)], ids=["each", "grouped", "one"])
@pytest.mark.parametrize("case", [*CASES, "nothing"])
def test_attention_by_xla_and_its_gradient_equal_jaxs(case, heads):
    rng = np.random.default_rng(1)
    given = {name: x for name, x in CASES.get(case, {"mask": (2, 1, 1)}).items() if name != "lengths"}
    q, k, v = (jnp.array(rng.normal(size=(2, 5, n, 8)), jnp.float32) for n in (heads[0], heads[1], heads[1]))
    if "mask" in given:
        rows, one, queries = given["mask"]
        seen = rng.random((rows, one, queries or 5, 5)) < 0.6
        given["mask"] = jnp.array(seen & (case != "nothing"))  # a row without keys attends to all keys equally
    if "bias" in given:
        given["bias"] = jnp.array(rng.normal(size=(1, heads[0], 5, 5)), jnp.float32)
    causal = given.pop("causal", False)

    def whole(function, **named):
        value, back = jax.vjp(lambda *inputs: function(*inputs, scale=0.5, **named, **given), q, k, v)
        return value, *back(jnp.cos(value))

    def ours(q, k, v, **named):
        return attend(q, k.swapaxes(1, 2), v.swapaxes(1, 2), **named)

    expected = whole(jax.nn.dot_product_attention, is_causal=causal)
    for actual, desired in zip(whole(ours, causal=causal), expected, strict=True):
        np.testing.assert_allclose(actual, desired, rtol=1e-5, atol=1e-5)
