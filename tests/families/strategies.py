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


def keeps(config: LMMConfig, counts: dict[str, int]):
    """Returns a strategy for keeps with the given counts, any indices, and legal sets of layers.

    An example is one seed. With a draw for each axis Hypothesis once reported inconsistent data generation, and the
    cause could not be reproduced; a single draw cannot end early.
    """
    present, local = sizes(config), local_axes(config)
    layers = {axis: layer_sets(config, axis, count) for axis, count in counts.items() if axis.endswith("/layers")}
    units = {axis: np.broadcast_to(np.arange(present[axis]), gate_shape(axis, present, local)) for axis in counts}

    def keep(seed: int) -> dict[str, np.ndarray]:
        random = np.random.default_rng(seed)
        return {
            axis: np.array(random.choice(layers[axis]), np.int32)
            if axis in layers
            else np.sort(random.permuted(units[axis], axis=-1)[..., :count], axis=-1).astype(np.int32)
            for axis, count in counts.items()
        }

    return st.integers(0, 2**32 - 1).map(keep)


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
