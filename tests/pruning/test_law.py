"""The law of the house: a model with closed gates computes what the shrunk model computes."""

from functools import lru_cache

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from antgmm_jax.axes import sizes
from antgmm_jax.config import LMMConfig
from antgmm_jax.functional import functional
from pruning.gates import gates_of, ones
from pruning.keep import identity
from pruning.shrink import shrink
from tests.pruning.models import CONFIGS, batch_of, parameters, valid_logits
from tests.pruning.strategies import keeps

# One size for each axis alone, and two for all at once: few shapes, so few compilations. Tied counts are not kept.
ALONE = {
    "blip2_t5": {
        "vision/layers": 2, "vision/embed": 13, "vision/heads": 2, "vision/mlp": 9,
        "bridge/layers": 2, "bridge/embed": 13, "bridge/heads": 2, "bridge/cross_heads": 1, "bridge/mlp": 9,
        "text/embed": 11, "encoder/layers": 2, "encoder/heads": 2, "encoder/mlp": 5,
        "decoder/layers": 2, "decoder/heads": 1, "decoder/cross_heads": 2, "decoder/mlp": 7,
    },
    "llava": {
        "vision/layers": 1, "vision/embed": 13, "vision/heads": 2, "vision/mlp": 9,
        "bridge/mlp": 17, "text/layers": 2, "text/embed": 19, "text/heads": 2, "text/mlp": 9,
    },
}  # fmt: skip
HALF = {family: {axis: -(-size // 2) for axis, size in sizes(config).items()} for family, config in CONFIGS.items()}


@lru_cache
def compiled(config: LMMConfig):
    """(params, batch, gates) -> logits, compiled once a config, and quickly: the shapes are many and tiny."""

    def apply(params, batch, gates):
        return functional(config).apply(params, batch, gates)["logits"]

    return jax.jit(apply, compiler_options={"xla_backend_optimization_level": 0})


def logits(config, params, gates):
    batch = batch_of(config)
    return valid_logits(batch, compiled(config)(params, batch, gates))


def assert_law(family, keep):
    config, params = CONFIGS[family], parameters(family)
    gated = logits(config, params, {**ones(config), **gates_of(keep, config)})
    shrunk = logits(*shrink(config, params, keep), {})
    np.testing.assert_allclose(gated, shrunk, rtol=0, atol=1e-5 * max(1.0, np.abs(shrunk).max()))


@pytest.mark.parametrize(("family", "axis"), [(family, axis) for family in CONFIGS for axis in ALONE[family]])
@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_one_axis(family, axis, data):
    assert_law(family, data.draw(keeps(CONFIGS[family], {axis: ALONE[family][axis]})))


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("counts", [ALONE, HALF], ids=["odd", "half"])
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_all_axes_at_once(family, counts, data):
    assert_law(family, data.draw(keeps(CONFIGS[family], counts[family])))


@pytest.mark.parametrize("family", CONFIGS)
def test_open_gates_change_nothing(family):
    assert_law(family, identity(CONFIGS[family]))


@pytest.mark.parametrize(("family", "axis"), [(family, axis) for family in CONFIGS for axis in ALONE[family]])
def test_a_wrong_unit_would_be_seen(family, axis):
    """The comparison can fail: closing one other unit of any axis moves the logits far past the tolerance."""
    config, params = CONFIGS[family], parameters(family)
    size = sizes(config)[axis]
    seen = []
    for drop in (0, size - 1):
        keep = {axis: np.delete(identity(config)[axis], drop, axis=-1)}
        seen.append(logits(config, params, {**ones(config), **gates_of(keep, config)}))
    assert np.abs(seen[0] - seen[1]).max() > 1e-3 * np.abs(seen[0]).max()
