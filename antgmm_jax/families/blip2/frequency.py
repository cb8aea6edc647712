"""Rules for removing layers from a Q-Former with cross-attention in every `cross_every`-th layer."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from antgmm_jax.axes import sizes
from antgmm_jax.config import LMMConfig
from antgmm_jax.errors import AntgmmError
from antgmm_jax.families.base import Depth, Keep

LAYERS, CROSS_HEADS = "bridge/layers", "bridge/cross_heads"
CROSS_LAYERS = "bridge/cross_layers"
"""Axis of the stacked cross-attentions; its indices follow from those of the layers."""


def every(config: LMMConfig) -> int:
    """Returns the cross-attention frequency n: layers with index % n == 0 have cross-attention."""
    return config.bridge.stack.cross_every


def with_every(config: LMMConfig, count: int) -> LMMConfig:
    """Returns the config with cross-attention in every `count`-th layer of the Q-Former."""
    stack = replace(config.bridge.stack, cross_every=count)
    return replace(config, bridge=replace(config.bridge, stack=stack))


class Frequency(Depth):
    """Pruning keeps the frequency, or keeps only layers with cross-attention and sets it to 1."""

    def sizes(self, config: LMMConfig) -> dict[str, int]:
        """Number of cross-attentions."""
        return {CROSS_LAYERS: config.bridge.stack.cross_layers}

    def variants(self, config: LMMConfig, smaller: LMMConfig) -> list[LMMConfig]:
        """Configs with the current frequency and, if enough layers have cross-attention, with frequency 1."""
        layers, has = smaller.bridge.stack.layers, config.bridge.stack.cross_layers
        cut = layers < config.bridge.stack.layers
        return [smaller, with_every(smaller, 1)] if every(config) > 1 and cut and layers <= has else [smaller]

    def reindex(self, config: LMMConfig, smaller: LMMConfig, keep: Keep) -> LMMConfig:
        """Sets the frequency that matches the kept layers with cross-attention, preferably the current one."""
        if LAYERS not in keep:
            return smaller
        layers, now = keep[LAYERS], every(config)
        has_cross, position = layers % now == 0, np.arange(len(layers))
        for candidate in (now, *range(1, len(layers) + 1)):
            if np.array_equal(position % candidate == 0, has_cross):
                return with_every(smaller, candidate)
        raise AntgmmError(
            f"{LAYERS} {layers.tolist()}: cross-attention would be in layers {position[has_cross].tolist()}, "
            f"which no frequency describes; remove layers in groups of {now}, or keep only layers with cross-attention"
        )

    def array_keep(self, config: LMMConfig, keep: Keep) -> dict[str, np.ndarray]:
        """Adds indices of the cross-attentions, and reduces `bridge/cross_heads` to their rows."""
        full, now = dict(keep), every(config)
        if CROSS_HEADS in keep:
            full[CROSS_HEADS] = keep[CROSS_HEADS][::now]
        if LAYERS in keep:
            layers = keep[LAYERS]
            full[CROSS_LAYERS] = layers[layers % now == 0] // now
        return full

    def by_layer(self, config: LMMConfig, scores: dict[str, Any]) -> dict[str, Any]:
        """Expands head scores to all layers (0 without cross-attention); adds each cross-attention to its layer."""
        if CROSS_LAYERS not in scores:
            return scores
        layers, now = config.bridge.stack.layers, every(config)
        heads = np.zeros((layers, config.bridge.stack.cross_heads), np.float32)
        heads[::now] = scores[CROSS_HEADS]
        whole = np.array(scores[LAYERS])
        whole[::now] += scores[CROSS_LAYERS]
        return {name: one for name, one in scores.items() if name != CROSS_LAYERS} | {CROSS_HEADS: heads, LAYERS: whole}

    def choose(
        self, config: LMMConfig, axis: str, scores: np.ndarray, variants: Sequence[LMMConfig]
    ) -> np.ndarray | None:
        """Chooses the legal set of layers with the largest sum of scores."""
        if axis != LAYERS:
            return None
        has_cross, options = np.arange(len(scores)) % every(config) == 0, []
        for variant in variants:
            pattern = np.arange(sizes(variant)[LAYERS]) % every(variant) == 0
            options.append(_best_subsequence(scores, has_cross, pattern))
        return max(options, key=lambda layers: scores[layers].sum(dtype=np.float64))


def _best_subsequence(score: np.ndarray, has_cross: np.ndarray, pattern: np.ndarray) -> np.ndarray:
    """Best ascending layers by sum of scores with cross-attention as in `pattern` (dynamic programming)."""
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for layer, value in enumerate(score.tolist()):
        # From long to short, so that each layer is used at most once.
        for length in sorted(best, reverse=True):
            if length < len(pattern) and pattern[length] == has_cross[layer]:
                total, chosen = best[length]
                longer = (total + value, (*chosen, layer))
                best[length + 1] = max(best.get(length + 1, longer), longer, key=lambda each: each[0])
    return np.array(best[len(pattern)][1], np.int32)
