"""Configs: round trips of sizes and JSON; every axis names a dimension of a parameter."""

import json

import jax

from antgmm_jax.axes import resize, sizes, to_dict
from antgmm_jax.families import family, family_of, from_dict, violations
from antgmm_jax.parallel import sharding
from antgmm_jax.pure import abstract, functional, is_axes


def test_a_checkpoint_has_its_family_and_a_legal_shape(case):
    assert family_of(case.model.config.model_type) is family(case.config)
    assert violations(case.config) == ()


def test_resize_inverts_sizes(case):
    present = sizes(case.config)
    wanted = {axis: max(1, size - 1) for axis, size in present.items()}
    assert sizes(resize(case.config, wanted)) == wanted
    assert resize(resize(case.config, wanted), present) == case.config


def test_json_round_trip(case):
    assert from_dict(json.loads(json.dumps(to_dict(case.config)))) == case.config


def test_every_axis_names_parameter_dimensions_of_its_size(case):
    cut = sizes(case.config)
    present = cut | family(case.config).depth.sizes(case.config)
    leaves, names = abstract(case.config), functional(case.config).axes
    seen = set()
    for leaf, axes in zip(jax.tree.leaves(leaves), jax.tree.leaves(names, is_leaf=is_axes), strict=True):
        assert len(axes) == leaf.ndim
        for size, axis in zip(leaf.shape, axes, strict=True):
            assert size == present.get(axis, size), axis
            seen.add(axis)
    assert set(cut) <= seen
    assert jax.tree.map(lambda leaf: leaf.shape, leaves) == jax.tree.map(lambda leaf: leaf.shape, case.params)


def test_every_axis_except_depth_has_a_sharding_rule(case):
    units = {axis.rpartition("/")[2] for axis in sizes(case.config)}
    assert units - {"layers"} <= sharding.RULES.keys()
