"""Hypothesis strategies for the units to keep of any model."""

from functools import cache
from itertools import combinations

import numpy as np
from hypothesis import strategies as st

from antgmm_jax.axes import sizes
from antgmm_jax.config import LMMConfig
from antgmm_jax.errors import AntgmmError
from antgmm_jax.pure import local_axes
from pruning.keep import gate_shape, shrunk_config


@st.composite
def keeps(draw, config: LMMConfig, counts: dict[str, int]):
    """Returns a strategy for keeps with the given counts, any indices, and legal sets of layers."""
    present, local, keep = sizes(config), local_axes(config), {}
    for axis, count in counts.items():
        row = st.permutations(range(present[axis])).map(lambda drawn, count=count: sorted(drawn[:count]))
        if axis.endswith("/layers"):
            row = st.sampled_from(layer_sets(config, axis, count))
        shape = gate_shape(axis, present, local)
        drawn = draw(row if len(shape) == 1 else st.lists(row, min_size=shape[0], max_size=shape[0]))
        keep[axis] = np.array(drawn, np.int32)
    return keep


@cache
def layer_sets(config: LMMConfig, axis: str, count: int) -> list[tuple[int, ...]]:
    """Returns all sets of `count` layers of an axis that a config of the family can describe."""

    def described(layers: tuple[int, ...]) -> bool:
        try:
            shrunk_config(config, {axis: np.array(layers, np.int32)})
        except AntgmmError:
            return False
        return True

    return [layers for layers in combinations(range(sizes(config)[axis]), count) if described(layers)]


def fewer(config: LMMConfig, fraction: float, *local: str) -> dict[str, int]:
    """Returns counts of about a fraction of the units of all axes, or of axes with these local names; at least one."""
    of = {axis: size for axis, size in sizes(config).items() if not local or axis.split("/")[1] in local}
    return {axis: max(1, int(fraction * size)) for axis, size in of.items()}
