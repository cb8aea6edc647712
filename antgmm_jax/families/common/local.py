"""Local layers of a stack: their indices follow the kept layers, and global layers stay among them."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from antgmm_jax.axes import sizes
from antgmm_jax.config import LMMConfig, Tower, towers
from antgmm_jax.families.base import Depth, Keep, best_with


class LocalLayers(Depth):
    """Renumbers the local layers of a tower, and keeps its share of global ones.

    Args:
        tower: name of the tower.
    """

    def __init__(self, tower: str):
        self._tower = tower

    def variants(self, config: LMMConfig, smaller: LMMConfig) -> list[LMMConfig]:
        """The config with the first layers; the scores may choose others."""
        tower = towers(smaller)[self._tower]
        return [_with_local(smaller, tower, [layer for layer, local in enumerate(tower.stack.is_local) if local])]

    def reindex(self, config: LMMConfig, smaller: LMMConfig, keep: Keep) -> LMMConfig:
        """Keeps the kind of each kept layer."""
        tower = towers(config)[self._tower]
        kept = keep.get(tower.axis("layers"), np.arange(tower.stack.layers))
        local = np.flatnonzero(np.isin(kept, tower.stack.local_layers))
        return _with_local(smaller, tower, local.tolist())

    def choose(
        self, config: LMMConfig, axis: str, scores: np.ndarray, variants: Sequence[LMMConfig]
    ) -> np.ndarray | None:
        """Chooses the best layers, among them as large a part of the global ones, at least one.

        Short rows and small images of calibration do not show what global layers are for.
        """
        tower = towers(config)[self._tower]
        apart = np.flatnonzero(np.logical_not(tower.stack.is_local))
        if axis != tower.axis("layers") or not 0 < len(apart) < tower.stack.layers:
            return None
        count = sizes(variants[0])[axis]
        least = max(1, len(apart) * count // tower.stack.layers)
        best = apart[np.argsort(-scores[apart], kind="stable")][:least]
        return best_with(best, scores, count)


def _with_local(config: LMMConfig, tower: Tower, layers: list[int]) -> LMMConfig:
    """Replaces the local layers of a tower: its root is the field path of its stack."""

    def changed(node: Any, path: list[str]) -> Any:
        if not path:
            return replace(node, local_layers=tuple(layers))
        return replace(node, **{path[0]: changed(getattr(node, path[0]), path[1:])})

    return changed(config, tower.root.split("/"))
