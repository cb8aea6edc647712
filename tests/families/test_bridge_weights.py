"""Weights of the bridge's tokens in every family: one for each token that the bridge loss compares."""

import jax
import numpy as np
import pytest

from antgmm_jax.blocks.projector import OUT
from antgmm_jax.pure import functional
from distill import LossConfig, bridge_weights, make_loss, online, parts
from distill.sensitivity import _of_outputs
from pruning.keep import identity
from tests.families.cases import FIRST, batch, case_of

MERGING = [(name, shape) for name, shape in FIRST if name in ("idefics3", "smolvlm", "internvl")]


@pytest.mark.long
def test_the_weights_of_a_family_fit_its_bridge_loss(first):
    config, params = first.config, first.params
    pure, rows = functional(config), batch(config)
    weights = bridge_weights(pure, params, [rows])
    assert weights.shape == (config.bridge_tokens,)
    np.testing.assert_allclose(weights.mean(), 1, rtol=1e-5)
    compared = parts(config, identity(config), bridge_weights=weights)
    loss = make_loss(pure, LossConfig(hard=0.0, bridge=1.0), teacher=online(pure, params), parts=compared)
    other = {**params, "bridge": {**params["bridge"]}, "vision": _larger(params["vision"])}
    assert 0 < float(loss(other, {}, rows, params)[0]) < np.inf


def _larger(tree):
    return {name: _larger(leaf) for name, leaf in tree.items()} if isinstance(tree, dict) else 1.1 * tree


@pytest.mark.long
def test_the_bridge_loss_trains_deepstack_and_weighs_each_merger_by_its_patches(tmp_path_factory):
    """The tokens of a slot's output are those of the first merger and of DeepStack's, each of a square of patches."""
    case = case_of("qwen3_vl", "two mergers", tmp_path_factory.getbasetemp())
    config, params, pure, rows = case.config, case.params, functional(case.config), batch(case.config)
    assert bridge_weights(pure, params, [rows]).shape == (3,)
    patches = config.vision.merge**2
    shares = _of_outputs(np.arange(3 * patches, dtype=np.float32), 3, True)
    np.testing.assert_array_equal(shares, [6, 22, 38])
    compared = parts(config, identity(config))
    loss = make_loss(pure, LossConfig(hard=0.0, bridge=1.0), teacher=online(pure, params), parts=compared)
    other = {**params, "vision": _larger(params["vision"])}
    gradient = jax.grad(lambda changed: loss(changed, {}, rows, params)[0])(other)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient["bridge"]))
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(gradient["language"]))


@pytest.mark.long
@pytest.mark.parametrize("merging", MERGING, ids=" ".join)
def test_the_share_of_a_patch_counts_for_the_token_that_it_is_merged_to(merging, tmp_path_factory):
    config, params = (case := case_of(*merging, tmp_path_factory.getbasetemp())).config, case.params
    pure, rows = functional(config), batch(config)
    features = np.asarray(pure.features(params, rows["images"]))
    patches = features.shape[2]
    assert patches > config.image_tokens > 1

    def output(changed):
        out = pure.apply(params, {**rows, "vision_features": changed}, collect=(OUT,))[OUT]
        return np.asarray(out)[0]

    whole = output(features)
    for patch in range(patches):
        changed = features.copy()
        changed[:, :, patch] += 1.0
        (moved,) = np.flatnonzero(np.abs(output(changed) - whole).max(axis=(0, 2)) > 1e-6)
        shares = _of_outputs(np.eye(patches, dtype=np.float32)[patch], config.image_tokens, False)
        np.testing.assert_array_equal(shares, np.eye(config.image_tokens)[moved])
