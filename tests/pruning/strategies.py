"""Hypothesis strategies that draw which units stay."""

import numpy as np
from hypothesis import strategies as st

from antgmm_jax.axes import sizes
from antgmm_jax.config import LMMConfig
from antgmm_jax.functional import local_axes
from pruning.keep import gate_shape

# Q-Former layer sets (of 4, cross-attention at 0 and 2) that keep the pattern, or cross layers only, by size.
BRIDGE_LAYERS = {1: ([0], [2]), 2: ([0, 1], [0, 3], [2, 3], [0, 2]), 3: ([0, 1, 2],)}


def rows(size: int, count: int):
    """One row: `count` of `size` indices, ascending."""
    return st.permutations(range(size)).map(lambda drawn: sorted(drawn[:count]))


@st.composite
def keeps(draw, config: LMMConfig, counts: dict[str, int]):
    """A keep of the given counts, its indices free."""
    present, local, keep = sizes(config), local_axes(config), {}
    for axis, count in counts.items():
        row = rows(present[axis], count)
        if axis == "bridge/layers" and count < present[axis]:
            row = st.sampled_from(BRIDGE_LAYERS[count])
        shape = gate_shape(axis, present, local)
        drawn = draw(row if len(shape) == 1 else st.lists(row, min_size=shape[0], max_size=shape[0]))
        keep[axis] = np.array(drawn, np.int32)
    return keep
