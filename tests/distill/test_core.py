"""Distillation steps of two families: online and cached teachers, shrunk and gated students."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from antgmm_jax.axes import sizes
from antgmm_jax.blocks.tokens import IGNORE
from antgmm_jax.errors import AntgmmError
from antgmm_jax.pure import functional
from distill import (
    LossConfig,
    OptimizerConfig,
    build_cache,
    cached,
    fingerprint,
    init_state,
    make_loss,
    make_optimizer,
    make_step,
    online,
    open_cache,
    parts,
)
from pruning.gates import gates_of
from pruning.keep import identity
from pruning.shrinking import shrink
from tests.pruning.models import CONFIGS, EACH, batch_of, parameters

ALL = LossConfig(hard=1.0, soft=1.0, pair=0.3, rank=0.2, hidden=0.5, vision=0.5, bridge=0.5, temperature=2.0)


def cut(family):
    """A config and a keep that drops a layer and random channels of the language and image towers."""
    config = CONFIGS[family]
    keep = identity(config)
    full = sizes(config)
    rng = np.random.default_rng(0)
    tower = "encoder" if family == "blip2_t5" else "text"
    for axis, count in {"vision/layers": 2, f"{tower}/layers": 2, "text/embed": 12, "vision/embed": 16}.items():
        keep[axis] = np.sort(rng.choice(full[axis], count, replace=False)).astype(np.int32)
    return config, keep


@pytest.mark.parametrize("family", EACH)
def test_the_gated_and_the_shrunk_model_have_equal_losses(family):
    config, keep = cut(family)
    params, batch = parameters(family), batch_of(config)
    teacher = online(functional(config), jax.tree.map(jnp.asarray, parameters(family)))
    gated = make_loss(functional(config), ALL, teacher=teacher, parts=parts(config, identity(config)))
    small_config, small = shrink(config, params, keep)
    shrunk = make_loss(functional(small_config), ALL, teacher=teacher, parts=parts(small_config, keep))
    value, terms = jax.jit(gated)(params, gates_of(keep, config), batch, teacher.params)
    expected, wanted = jax.jit(shrunk)(small, {}, batch, teacher.params)
    assert set(terms) == set(ALL.terms())
    for name in terms:
        np.testing.assert_allclose(terms[name], wanted[name], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(value, expected, rtol=1e-4)


@pytest.mark.parametrize("family", EACH)
def test_steps_with_every_loss_lower_the_loss_of_a_cut_student(family):
    config, keep = cut(family)
    model, batch = functional(config), batch_of(config)
    teacher = online(model, parameters(family))
    student_config, student = shrink(config, parameters(family), keep)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=3e-3, schedule="constant"), steps=100)
    step = make_step(
        functional(student_config),
        optimizer,
        ALL,
        teacher=teacher,
        parts=parts(student_config, keep),
        micro_batches=2,
        chunk=2,
    )
    state, history = init_state(student, optimizer), []
    for _ in range(8):
        state, metrics = step(state, batch, {}, teacher.params)
        history.append(float(metrics["loss"]))
    assert step.program._cache_size() == 1
    assert history[-1] < 0.9 * history[0]


@pytest.mark.parametrize("family", EACH)
def test_an_uncut_student_has_zero_loss(family):
    config = CONFIGS[family]
    teacher = online(functional(config), parameters(family))
    config_ = LossConfig(hard=0.0, soft=1.0, rank=1.0, hidden=1.0, vision=1.0, bridge=1.0)
    loss = make_loss(functional(config), config_, teacher=teacher, parts=parts(config, identity(config)))
    value, _ = jax.jit(loss)(parameters(family), {}, batch_of(config), teacher.params)
    np.testing.assert_allclose(value, 0.0, atol=1e-5)


@pytest.mark.parametrize("family", EACH)
def test_the_bridge_loss_by_hand(family):
    config, keep = cut(family)
    batch, params = batch_of(config), parameters(family)
    small_config, small = shrink(config, params, keep)
    loss = make_loss(
        functional(small_config),
        LossConfig(hard=0.0, bridge=1.0),
        teacher=online(functional(config), params),
        parts=parts(small_config, keep),
    )
    outputs = []
    with jax.numpy_rank_promotion("allow"):
        for of, weights in ((config, params), (small_config, small)):
            features = functional(of).features(weights, batch["images"])
            if family == "blip2_t5":
                outputs.append(features @ weights["bridge"]["out"] + weights["bridge"]["out_bias"])
            else:
                bridge = weights["bridge"]
                inner = jax.nn.gelu(features @ bridge["up"] + bridge["up_bias"], approximate=False)
                outputs.append(inner @ bridge["down"] + bridge["down_bias"])
    whole, got = outputs[0][..., keep["text/embed"]], outputs[1]
    expected = np.mean(np.sum((got - whole) ** 2, -1) / np.sum(whole**2, -1))
    value, _ = loss(small, {}, batch, params)
    assert expected > 0.01
    np.testing.assert_allclose(value, expected, rtol=1e-4)


@pytest.mark.parametrize("family", EACH)
def test_cached_targets_equal_online_ones(family, tmp_path):
    config = CONFIGS[family]
    model, params = functional(config), parameters(family)
    tower = "encoder" if family == "blip2_t5" else "text"
    names = ("final", "vision/states", f"{tower}/states", "bridge/out")
    batch = batch_of(config) | {"index": np.array([1, 0])}
    key = fingerprint(params, "two rows")
    build_cache(model, params, [batch], tmp_path / "cache", samples=2, like=batch, key=key, names=names)
    cache = cached(model, params, open_cache(tmp_path / "cache", key=key, names=names))
    live = online(model, params)
    got, expected = (jax.jit(teacher.select(names))(teacher.params, teacher.attach(batch)) for teacher in (cache, live))
    # The cache has no padding, and gives zeros there.
    counted = {"final": batch["targets"] != IGNORE, f"{tower}/states": batch["attention_mask"].astype(bool)}
    for name in names:
        assert got[name].shape == expected[name].shape
        used = counted.get(name, np.ones((), bool))
        desired = np.where(used[..., None], expected[name], 0)
        np.testing.assert_allclose(got[name].astype(np.float32), desired, rtol=2**-8, atol=1e-6)
    hidden = expected["final"]
    np.testing.assert_allclose(cache.head(cache.params, hidden), model.head(params, hidden), rtol=1e-6)
    assert len(jax.tree.leaves(cache.params)) == 1  # the head's matrix, or the tied token table


def test_cached_vision_features_serve_text_losses_and_refuse_vision_ones():
    config = CONFIGS["blip2_t5"]
    model, params = functional(config), parameters("blip2_t5")
    batch = batch_of(config)
    stored = batch | {
        "images": {"valid": batch["images"]["valid"]},
        "vision_features": model.features(params, batch["images"]),
    }
    teacher = online(model, params)
    losses = [
        make_loss(
            model,
            LossConfig(hard=1.0, hidden=1.0, vision=weight),
            teacher=teacher,
            parts=parts(config, identity(config)),
        )
        for weight in (0.0, 1.0)
    ]
    np.testing.assert_allclose(
        losses[0](params, {}, stored, params)[0],
        losses[0](params, {}, batch, params)[0],
        rtol=1e-5,
    )
    with pytest.raises(AntgmmError, match="vision/states"):
        losses[1](params, {}, stored, params)


def test_parts_name_the_tower_that_is_missing_from_a_keep():
    config = CONFIGS["llava"]
    keep = identity(config)
    del keep["vision/embed"]
    with pytest.raises(AntgmmError, match=r"vision.*vision/embed"):
        parts(config, keep)


def test_an_online_teacher_reads_pictures_and_not_the_students_features():
    config = CONFIGS["blip2_t5"]
    model, params = functional(config), parameters("blip2_t5")
    batch = batch_of(config)
    others = jax.tree.map(lambda leaf: leaf * 1.5, params)
    features = model.features(others, batch["images"])
    targets = online(model, params).select(("final",))
    expected = targets(params, batch)["final"]
    np.testing.assert_array_equal(targets(params, batch | {"vision_features": features})["final"], expected)
    alone = batch | {"images": {"valid": batch["images"]["valid"]}}
    assert np.abs(targets(params, alone | {"vision_features": features})["final"] - expected).max() > 1e-2


@pytest.mark.parametrize(
    ("family", "images", "language"),
    [("blip2_t5", {"vision", "bridge"}, {"encoder", "decoder"}), ("llava", {"vision"}, {"text"})],
)
def test_the_vision_term_compares_the_image_side_alone(family, images, language):
    """Also where the language model reads image tokens; it would have to run for them."""
    compared = parts(CONFIGS[family], identity(CONFIGS[family]))
    towers = {term: {part.tower for part in compared if part.term == term} for term in ("vision", "hidden")}
    assert towers == {"vision": images, "hidden": language}
