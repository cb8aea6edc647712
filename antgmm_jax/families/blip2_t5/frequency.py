"""The Q-Former's cross-attention stands at every `cross_every`-th layer: what that means when layers go."""

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
"""Axis of the stack of cross-attentions, whose indices follow from those of the layers."""


def every(config: LMMConfig) -> int:
    """At which layers cross-attention stands: those with index % every == 0."""
    return config.bridge.stack.cross_every


def with_every(config: LMMConfig, count: int) -> LMMConfig:
    """The same model whose Q-Former reads the picture at every `count`-th layer."""
    stack = replace(config.bridge.stack, cross_every=count)
    return replace(config, bridge=replace(config.bridge, stack=stack))


class Frequency(Depth):
    """A cut keeps the frequency, or keeps only layers with cross-attention and sets it to 1."""

    def sizes(self, config: LMMConfig) -> dict[str, int]:
        """The number of cross-attentions."""
        return {CROSS_LAYERS: config.bridge.stack.cross_layers}

    def variants(self, config: LMMConfig, smaller: LMMConfig) -> list[LMMConfig]:
        """The present frequency, or every layer where as many have cross-attention."""
        layers, has = smaller.bridge.stack.layers, config.bridge.stack.cross_layers
        cut = layers < config.bridge.stack.layers
        return [smaller, with_every(smaller, 1)] if every(config) > 1 and cut and layers <= has else [smaller]

    def reindex(self, config: LMMConfig, smaller: LMMConfig, keep: Keep) -> LMMConfig:
        """The frequency that puts cross-attention exactly on the kept layers that have it: the present if it fits."""
        if LAYERS not in keep:
            return smaller
        layers, now = keep[LAYERS], every(config)
        has_cross, position = layers % now == 0, np.arange(len(layers))
        for candidate in (now, *range(1, len(layers) + 1)):
            if np.array_equal(position % candidate == 0, has_cross):
                return with_every(smaller, candidate)
        raise AntgmmError(
            f"{LAYERS} {layers.tolist()}: cross attention would fall on positions {position[has_cross].tolist()}, "
            f"which no frequency describes; drop layers in groups of {now}, or keep only layers with cross attention"
        )

    def array_keep(self, config: LMMConfig, keep: Keep) -> dict[str, np.ndarray]:
        """With indices of the cross-attentions, and rows of `bridge/cross_heads` for those alone."""
        full, now = dict(keep), every(config)
        if CROSS_HEADS in keep:
            full[CROSS_HEADS] = keep[CROSS_HEADS][::now]
        if LAYERS in keep:
            layers = keep[LAYERS]
            full[CROSS_LAYERS] = layers[layers % now == 0] // now
        return full

    def by_layer(self, config: LMMConfig, scores: dict[str, Any]) -> dict[str, Any]:
        """Rows of heads for all layers, 0 where there are none; a cross-attention counts to its layer."""
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
        """The legal set of layers with the largest sum of scores."""
        if axis != LAYERS:
            return None
        has_cross, options = np.arange(len(scores)) % every(config) == 0, []
        for variant in variants:
            pattern = np.arange(sizes(variant)[LAYERS]) % every(variant) == 0
            options.append(_best_subsequence(scores, has_cross, pattern))
        return max(options, key=lambda layers: scores[layers].sum(dtype=np.float64))


def _best_subsequence(score: np.ndarray, has_cross: np.ndarray, pattern: np.ndarray) -> np.ndarray:
    """Ascending layers whose cross-attention follows `pattern`, of the largest sum of scores (dynamic programming)."""
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for layer, value in enumerate(score.tolist()):
        # From long to short, so that a layer is used once.
        for length in sorted(best, reverse=True):
            if length < len(pattern) and pattern[length] == has_cross[layer]:
                total, chosen = best[length]
                longer = (total + value, (*chosen, layer))
                best[length + 1] = max(best.get(length + 1, longer), longer, key=lambda each: each[0])
    return np.array(best[len(pattern)][1], np.int32)
