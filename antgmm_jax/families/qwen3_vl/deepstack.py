"""DeepStack: additional mergers read the residual stream after some vision layers; their outputs are added to the
residual stream of the first text layers.

A merger is kept or removed with the vision layer that it reads. As in the files, the output of the n-th kept merger is
added after the n-th text layer.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from antgmm_jax.axes import sizes
from antgmm_jax.errors import AntgmmError
from antgmm_jax.families.base import Depth, Keep
from antgmm_jax.families.qwen3_vl.config import UNITS, Qwen3VLConfig

LAYERS, TEXT = "vision/layers", "text/layers"
MERGERS = "vision/deepstack_layers"
"""Axis of the stack of mergers; its indices follow from those of the layers."""


def with_taps(config: Qwen3VLConfig, taps: Sequence[int]) -> Qwen3VLConfig:
    """Replaces the layers that DeepStack reads."""
    units = config.vision.deepstack_mlp if taps else 0
    return replace(config, vision=replace(config.vision, taps=tuple(taps), deepstack_mlp=units))


def entered(present: Float[Array, " K"]) -> Float[Array, "K K"]:
    """Weights with which mergers' outputs are added after each of the first text layers, [text layers, mergers].

    A merger's output is added after the text layer n if n earlier mergers are present. For gates of 0 and 1 the weights
    are 0 and 1; for other gates, the probability of that case if each gate is the probability of presence.

    Args:
        present: gates of the layers that the mergers read.
    """
    before, columns = jnp.zeros_like(present).at[0].set(1), []
    for gate in present:
        columns.append(before * gate)
        before = before * (1 - gate) + jnp.concatenate([jnp.zeros((1,)), before[:-1]]) * gate
    return jnp.stack(columns, axis=1)


class DeepStack(Depth):
    """Removes mergers with their layers, and keeps the text layers after which they are added."""

    def sizes(self, config: Qwen3VLConfig) -> dict[str, int]:
        """The number of mergers."""
        return {MERGERS: len(config.vision.taps)} if config.vision.taps else {}

    def variants(self, config: Qwen3VLConfig, smaller: Qwen3VLConfig) -> list[Qwen3VLConfig]:
        """The config with as many mergers as the layers allow; the scores may leave fewer."""
        layers, taps = smaller.vision.stack.layers, config.vision.taps[: smaller.vision.stack.layers]
        first = layers - len(taps)
        return [with_taps(smaller, [min(tap, first + place) for place, tap in enumerate(taps)])]

    def reindex(self, config: Qwen3VLConfig, smaller: Qwen3VLConfig, keep: Keep) -> Qwen3VLConfig:
        """Renumbers the layers that DeepStack reads."""
        taps = config.vision.taps
        if LAYERS in keep:
            taps = tuple(np.flatnonzero(np.isin(keep[LAYERS], taps)).tolist())
        first = np.arange(len(taps))
        if TEXT in keep and not np.array_equal(keep[TEXT][: len(taps)], first):
            raise AntgmmError(f"{TEXT} {keep[TEXT].tolist()}: DeepStack needs the first {len(taps)} layers: keep them")
        return with_taps(smaller, taps)

    def array_keep(self, config: Qwen3VLConfig, keep: Keep) -> dict[str, np.ndarray]:
        """Adds indices of the mergers, and reduces the rows of their units to the mergers' layers."""
        full, taps = dict(keep), np.array(config.vision.taps, int)
        if UNITS in keep:
            full[UNITS] = keep[UNITS][taps]
        if LAYERS in keep and len(taps):
            full[MERGERS] = np.flatnonzero(np.isin(taps, keep[LAYERS]))
        return full

    def by_layer(self, config: Qwen3VLConfig, scores: dict[str, Any]) -> dict[str, Any]:
        """Expands the units' rows to all layers, 0 for those without a merger; adds mergers to their layers."""
        if MERGERS not in scores:
            return scores
        taps, layers = [*config.vision.taps], config.vision.stack.layers
        units = np.zeros((layers, config.vision.deepstack_mlp), np.float32)
        units[taps] = scores[UNITS]
        whole = np.array(scores[LAYERS])
        whole[taps] += scores[MERGERS]
        return {name: one for name, one in scores.items() if name != MERGERS} | {UNITS: units, LAYERS: whole}

    def choose(
        self, config: Qwen3VLConfig, axis: str, scores: np.ndarray, variants: Sequence[Qwen3VLConfig]
    ) -> np.ndarray | None:
        """Chooses text layers: those that DeepStack needs and the best of the others."""
        if axis != TEXT or not config.vision.taps:
            return None
        count = sizes(variants[0])[TEXT]
        first = min(len(config.vision.taps), count)
        others = first + np.argsort(-scores[first:], kind="stable")[: count - first]
        return np.concatenate([np.arange(first), np.sort(others)]).astype(np.int32)
