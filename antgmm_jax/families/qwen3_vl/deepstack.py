"""DeepStack: additional mergers read the residual stream after some vision layers; their outputs are added to the
residual stream of the first text layers.

The vision layers that mergers read and the text layers that they add to are always kept, so no merger is removed.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from antgmm_jax.axes import sizes
from antgmm_jax.errors import AntgmmError
from antgmm_jax.families.base import Depth, Keep, best_with
from antgmm_jax.families.qwen3_vl.config import UNITS, Qwen3VLConfig

LAYERS, TEXT = "vision/layers", "text/layers"
MERGERS = "vision/deepstack_layers"
"""Axis of the stack of mergers; its indices follow from those of the layers."""


def with_taps(config: Qwen3VLConfig, taps: Sequence[int]) -> Qwen3VLConfig:
    """Replaces the layers that DeepStack reads."""
    return replace(config, vision=replace(config.vision, taps=tuple(taps)))


class DeepStack(Depth):
    """Keeps the layers between which mergers stand, and renumbers those that they read."""

    def sizes(self, config: Qwen3VLConfig) -> dict[str, int]:
        """The number of mergers."""
        return {MERGERS: len(config.vision.taps)} if config.vision.taps else {}

    def variants(self, config: Qwen3VLConfig, smaller: Qwen3VLConfig) -> list[Qwen3VLConfig]:
        """The config with the first layers between the mergers; the scores may choose others."""
        taps = config.vision.taps
        first = smaller.vision.stack.layers - len(taps)
        return [with_taps(smaller, [min(tap, max(first, 0) + place) for place, tap in enumerate(taps)])]

    def reindex(self, config: Qwen3VLConfig, smaller: Qwen3VLConfig, keep: Keep) -> Qwen3VLConfig:
        """Renumbers the layers that DeepStack reads."""
        for axis, needed in self._needed(config).items():
            if axis in keep and not np.isin(needed, keep[axis]).all():
                kept = keep[axis].tolist()
                raise AntgmmError(f"{axis} {kept}: DeepStack needs the layers {needed.tolist()}: keep them")
        taps = config.vision.taps
        return with_taps(smaller, np.searchsorted(keep[LAYERS], taps).tolist() if LAYERS in keep else taps)

    def array_keep(self, config: Qwen3VLConfig, keep: Keep) -> dict[str, np.ndarray]:
        """Reduces the rows of the mergers' units to the layers that they read."""
        return {**keep, **({UNITS: keep[UNITS][[*config.vision.taps]]} if UNITS in keep else {})}

    def by_layer(self, config: Qwen3VLConfig, scores: dict[str, Any]) -> dict[str, Any]:
        """Expands the units' rows to all layers, 0 for those without a merger."""
        if MERGERS not in scores:
            return scores
        units = np.zeros((config.vision.stack.layers, config.vision.deepstack_mlp), np.float32)
        units[[*config.vision.taps]] = scores[UNITS]
        return {name: one for name, one in scores.items() if name != MERGERS} | {UNITS: units}

    def choose(
        self, config: Qwen3VLConfig, axis: str, scores: np.ndarray, variants: Sequence[Qwen3VLConfig]
    ) -> np.ndarray | None:
        """Chooses the layers that DeepStack needs and the best of the others."""
        needed = self._needed(config).get(axis)
        return None if needed is None else best_with(needed, scores, sizes(variants[0])[axis])

    def _needed(self, config: Qwen3VLConfig) -> dict[str, np.ndarray]:
        """The layers that mergers read, and those that they add to."""
        taps = np.array(config.vision.taps, int)
        return {LAYERS: taps, TEXT: np.arange(len(taps))} if len(taps) else {}
