"""Rematerialisation policies change memory use but not gradients."""

import re

import jax
import numpy as np
import pytest

from antgmm_jax.axes import resize
from antgmm_jax.errors import AntgmmError
from antgmm_jax.parallel import sharding
from antgmm_jax.parallel.sharding import make_mesh
from antgmm_jax.pure import abstract, functional
from distill import LossConfig, make_loss
from tests.pruning.models import CONFIGS, EACH, batch_of, parameters

POLICIES = ("none", "dots", "attention", "full")
DEEP = {
    "blip2_t5": {"vision/layers": 6, "encoder/layers": 8, "decoder/layers": 8},
    "llava": {"vision/layers": 6, "text/layers": 12},
}


def gradient(config, remat):
    loss = make_loss(functional(config, remat), LossConfig())
    return jax.jit(jax.grad(lambda params, batch: loss(params, {}, batch, {})[0]))


@pytest.mark.parametrize("family", EACH)
def test_gradients_do_not_depend_on_the_policy(family):
    config = CONFIGS[family]
    plain, *others = (gradient(config, remat)(parameters(family), batch_of(config)) for remat in POLICIES)
    for other in others:
        for got, want in zip(jax.tree.leaves(other), jax.tree.leaves(plain), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("family", EACH)
def test_policies_that_keep_less_use_less_memory(family):
    config = resize(CONFIGS[family], DEEP[family])
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((32, *x.shape[1:]), x.dtype), batch_of(config))
    peaks = {}
    for remat in POLICIES:
        analysis = gradient(config, remat).lower(abstract(config), batch).compile().memory_analysis()
        assert analysis is not None
        peaks[remat] = analysis.temp_size_in_bytes
    assert 1.5 * peaks["full"] < peaks["dots"] < peaks["none"] / 1.5


@pytest.mark.long
@pytest.mark.parametrize("remat", POLICIES)
def test_split_weights_are_gathered_one_layer_at_a_time(remat):
    config = resize(CONFIGS["llava"], {"text/layers": 13, "text/embed": 64, "text/mlp": 256})
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((8, *x.shape[1:]), x.dtype), batch_of(config))
    with jax.set_mesh(make_mesh(fsdp=8)):
        params = sharding.place_tree(abstract(config), functional(config).axes)
        rows = jax.tree.map(lambda x: sharding.place(x, ("batch",)), batch)
        text = gradient(config, remat).lower(params, rows).compile().as_text()
    shapes = {*re.findall(r"f32\[([\d,]+)\]", text)}
    assert {"64,256", "256,64"} & shapes  # products contract whole widths,
    assert not {"13,64,256", "13,256,64", "13,1,64,256", "13,1,256,64"} & shapes  # and no stack of whole weights exists


def test_an_unknown_policy_is_refused():
    with pytest.raises(AntgmmError, match="remat = 'some': give one of none, dots, attention, full"):
        functional(CONFIGS["llava"], "some")
