"""Importance scores equal values computed by hand on small trees and models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from antgmm_jax.axes import sizes
from antgmm_jax.config import towers
from antgmm_jax.errors import AntgmmError
from antgmm_jax.pure import functional, local_axes
from pruning.gates import ones
from pruning.importance import activation, block_influence, last, magnitude, mean_of, random, taylor
from pruning.keep import gate_shape
from tests.pruning.models import CONFIGS, batch_of, parameters


def test_taylor_by_hand_is_the_mean_of_absolute_gradients():
    def loss(params, gates, batch):
        return jnp.sum(params["w"] * gates["t/embed"] * batch["x"])

    params, gates = {"w": jnp.array([1.0, 2.0, -3.0, 4.0])}, {"t/embed": np.ones(4, np.float32)}
    batches = [{"x": jnp.array([1.0, -1.0, 1.0, 0.0])}, {"x": jnp.array([3.0, 1.0, 1.0, 0.5])}]
    scores = taylor(loss, params, gates, batches)
    # |w x| of the two batches: [1, 2, 3, 0] and [3, 2, 3, 2]; the signs of the second unit do not cancel.
    np.testing.assert_allclose(scores["t/embed"], [2.0, 2.0, 3.0, 1.0])
    assert scores["t/embed"].dtype == np.float32


def test_bfloat16_scores_are_averaged_in_float32():
    # Above 256 bfloat16 has only even integers, so a sum of ones in bfloat16 stays at 256.
    values = [256.0] + [1.0] * 31
    mean = mean_of(lambda batch: batch, [{"t/mlp": jnp.full(1, value, jnp.bfloat16)} for value in values])
    np.testing.assert_allclose(mean["t/mlp"], [287 / 32])
    assert mean["t/mlp"].dtype == np.float32


def test_taylor_takes_the_gradient_of_bfloat16_gates_in_float32():
    # A gradient has the dtype of the gates, and bfloat16 cannot represent 257.
    def loss(params, gates, batch):
        return jnp.sum(params["w"] * gates["t/embed"])

    scores = taylor(loss, {"w": jnp.array([257.0])}, {"t/embed": jnp.ones(1, jnp.bfloat16)}, [{}])
    np.testing.assert_allclose(scores["t/embed"], [257.0])


@pytest.mark.parametrize("score", [taylor, activation, block_influence])
def test_scores_without_batches_are_refused(score):
    arguments = {taylor: ({}, {}, []), activation: ({}, [], ["t/mlp"], []), block_influence: ({}, [], [])}
    with pytest.raises(AntgmmError, match="at least one calibration batch"):
        score(lambda *_: None, *arguments[score])


def test_magnitude_of_a_model_by_hand():
    config = CONFIGS["llava"]
    zeros = jax.tree.map(np.zeros_like, parameters("llava"))
    mlp = zeros["language"]["decoder"]["blocks"]["mlp"]
    mlp["up"][1, 5, 3], mlp["gate"][1, 6, 3], mlp["down"][1, 3, 7] = 3.0, 4.0, 12.0
    zeros["language"]["norm"]["scale"][7] = 5.0
    scores = magnitude(zeros, config)
    assert {a: s.shape for a, s in scores.items()} == {a: g.shape for a, g in ones(config).items()}
    expected = np.zeros((3, 20))
    expected[1, 3] = 13.0
    np.testing.assert_allclose(scores["text/mlp"], expected)
    np.testing.assert_allclose(scores["text/layers"], [0, 13, 0])
    np.testing.assert_allclose(scores["text/embed"][[5, 6, 7]], [3, 4, 13])
    assert not scores["vision/mlp"].any()


def test_magnitude_of_the_q_former_counts_its_cross_layers():
    config, params = CONFIGS["blip2_t5"], parameters("blip2_t5")
    scores, stack = magnitude(params, config), params["bridge"]["stack"]
    cross, blocks = (jax.tree.leaves(stack[name]) for name in ("cross", "blocks"))
    layer = [sum(np.sum(w[i] ** 2) for w in blocks) for i in range(4)]
    for i in (0, 2):
        layer[i] += sum(np.sum(w[i // 2] ** 2) for w in cross)
    np.testing.assert_allclose(scores["bridge/layers"], np.sqrt(layer), rtol=1e-5)
    assert scores["bridge/cross_heads"].shape == (4, 3)
    assert (scores["bridge/cross_heads"] > 0).all(axis=1).tolist() == [True, False, True, False]


def test_activation_by_hand():
    norms = {"t/mlp": jnp.array([[[1.0, 2.0], [3.0, 4.0]]]), "t/heads": jnp.array([[[1.0]], [[2.0]]]),
             "t/embed": jnp.array([[1.0, 0.0], [2.0, 4.0]])}  # fmt: skip

    def apply(params, batch, collect):
        return {name: norms[name] * batch["scale"] for name in collect}

    batches = [{"scale": jnp.float32(1)}, {"scale": jnp.float32(3)}]
    scores = activation(apply, {}, batches, norms, {"t/mlp"})
    np.testing.assert_allclose(scores["t/mlp"], [[4.0, 6.0]])
    np.testing.assert_allclose(scores["t/heads"], [3.0])
    np.testing.assert_allclose(scores["t/embed"], [3.0, 4.0])


def test_activation_is_a_mean_over_the_samples_of_all_batches():
    def apply(params, batch, collect):
        return {"vision/mlp": batch["norms"]}

    # One used slot of norm 10, and nine of norm 1: the tenth is unused.
    batches = [
        {"norms": jnp.full((1, slots, 1), norm), "images": {"valid": jnp.arange(slots)[None] < used}}
        for slots, used, norm in ((2, 1, 10.0), (10, 9, 1.0), (3, 0, 5.0))
    ]
    scores = activation(apply, {}, batches, ["vision/mlp"], ["vision/mlp"])
    np.testing.assert_allclose(scores["vision/mlp"], [[1.9]], rtol=1e-6)


def test_activation_ignores_answer_padding():
    config, params = CONFIGS["blip2_t5"], parameters("blip2_t5")
    batch, axes = batch_of(config), ["decoder/heads", "decoder/cross_heads", "decoder/mlp", "text/embed"]
    wider = dict(batch)
    for name, fill in (("labels", -100), ("targets", -100), ("decoder_input_ids", 7), ("positions", 0)):
        wider[name] = np.pad(batch[name], ((0, 0), (0, 5)), constant_values=fill)
    plain, padded = (
        activation(functional(config).apply, params, [each], axes, local_axes(config)) for each in (batch, wider)
    )
    for axis in axes:
        np.testing.assert_allclose(padded[axis], plain[axis], rtol=1e-4)


def test_block_influence_by_hand_ignores_padding():
    # Two blocks: the first rotates the first token by a right angle, the second reverses the second token.
    x, y = [1.0, 0.0], [0.0, 2.0]
    states = jnp.array([[[x, x]], [[y, x]], [[y, [-1.0, 0.0]]]])

    def apply(params, batch, collect):
        return dict.fromkeys(collect, states)

    images = {"valid": jnp.ones((1, 1), bool)}
    batch = {"images": images, "attention_mask": jnp.array([[1, 0]]), "labels": jnp.array([[-100, 4]])}
    deep = towers(CONFIGS["blip2_t5"])
    scores = block_influence(apply, {}, [batch], [deep[name] for name in ("vision", "encoder", "decoder")])
    np.testing.assert_allclose(scores["vision/layers"], [0.5, 1.0])
    np.testing.assert_allclose(scores["encoder/layers"], [1.0, 0.0])
    np.testing.assert_allclose(scores["decoder/layers"], [0.0, 2.0])


def test_block_influence_is_a_mean_over_the_tokens_of_all_batches():
    turned = jnp.array([[[[1.0, 0.0]] * 3], [[[0.0, 1.0]] * 3]])
    same = jnp.array([[[[1.0, 0.0]] * 3]] * 2)

    def apply(params, batch, collect):
        return dict.fromkeys(collect, batch["states"])

    rest = {"images": {"valid": jnp.zeros((1, 1), bool)}, "labels": jnp.full((1, 3), -100)}
    batches = [
        {**rest, "states": turned, "attention_mask": jnp.array([[1, 1, 1]])},
        {**rest, "states": same, "attention_mask": jnp.array([[1, 0, 0]])},
    ]
    deep = towers(CONFIGS["blip2_t5"])
    scores = block_influence(apply, {}, batches, [deep[name] for name in ("vision", "encoder")])
    np.testing.assert_allclose(scores["encoder/layers"], [0.75])
    np.testing.assert_allclose(scores["vision/layers"], [0.0])  # there is no image in any row


@pytest.mark.parametrize("family", CONFIGS)
def test_random_scores_have_every_shape_and_follow_the_key(family):
    config = CONFIGS[family]
    present, local = sizes(config), local_axes(config)
    one, same, other = (random(jax.random.key(seed), present, local) for seed in (0, 0, 1))
    assert {a: s.shape for a, s in one.items()} == {a: gate_shape(a, present, local) for a in present}
    jax.tree.map(np.testing.assert_array_equal, one, same)
    assert all((one[axis] != other[axis]).all() for axis in one)


def test_last_scores_fall_with_depth():
    scores = last({"text/layers": 3, "text/mlp": 8})
    assert list(scores) == ["text/layers"]
    np.testing.assert_array_equal(scores["text/layers"], [3, 2, 1])
