"""Random units to keep of any model."""

from functools import cache
from itertools import combinations

import numpy as np

from antgmm_jax.axes import sizes
from antgmm_jax.config import LMMConfig
from antgmm_jax.errors import AntgmmError
from antgmm_jax.pure import local_axes
from pruning.keep import gate_shape, shrunk_config


def random_keep(config: LMMConfig, counts: dict[str, int], seed: int) -> dict[str, np.ndarray]:
    """Returns a keep with the given counts, any indices, and legal sets of layers, of more if necessary."""
    present, local, random = sizes(config), local_axes(config), np.random.default_rng(seed)

    def kept(axis: str, count: int) -> np.ndarray:
        if axis.endswith("/layers"):
            legal = next(sets for n in range(count, present[axis] + 1) if (sets := layer_sets(config, axis, n)))
            return np.array(random.choice(legal), np.int32)
        units = np.broadcast_to(np.arange(present[axis]), gate_shape(axis, present, local))
        return np.sort(random.permuted(units, axis=-1)[..., :count], axis=-1).astype(np.int32)

    return {axis: kept(axis, count) for axis, count in counts.items()}


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
