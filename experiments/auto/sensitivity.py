"""Sensitivity of a model's loss to cuts of each axis, and the weights of the axes for the search of sizes."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import exp, log
from typing import Any

import jax
import numpy as np

import pruning
from antgmm_jax.axes import sizes
from antgmm_jax.config import LMMConfig, on_image_side
from antgmm_jax.errors import AntgmmError
from antgmm_jax.families import complete
from antgmm_jax.parallel import preemption
from antgmm_jax.parallel.processes import gather
from antgmm_jax.pure import Params, functional
from distill import LossConfig, make_loss

CLOSED = 0.75
"""Part of an axis that is closed to measure its sensitivity. Half costs hardly anything where eight times fewer
parameters leave an eighth of an axis (docs/lab/tasks.md)."""
LEAST = 0.01
"""Smaller increases of the loss are noise."""
FACTORS = (0.25, 4.0)
"""Smallest and largest factor on the weight of an axis."""


def reduced(config: LMMConfig, part: float = CLOSED) -> dict[str, int]:
    """Returns the units of each free axis that are left when a part of it is closed; few units may have no such size.

    Args:
        config: model config.
        part: part of the units to close.

    Returns:
        axis -> units, a legal size; without axes that have no smaller one.
    """
    present, left = sizes(config), {}
    for axis in pruning.free_axes(config):
        try:
            target = pruning.legal_above(config, {axis: max(1, round((1 - part) * present[axis]))})
        except AntgmmError:
            continue
        left[axis] = complete(config, target)[axis]
    return {axis: units for axis, units in left.items() if units < present[axis]}


def closed(config: LMMConfig, scores: Mapping[str, np.ndarray], left: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """Returns, for each axis, gates that close its least important units.

    Args:
        config: model config.
        scores: axis -> importance of all axes.
        left: axis -> units that stay open, from `reduced`.

    Returns:
        axis -> gates of that axis and the axes tied to it.
    """
    return {axis: pruning.gates_of(pruning.plan(scores, config, {axis: units}), config) for axis, units in left.items()}


class InTime:
    """Batches; a pass over them ends before the one that would end too late, but never before the first.

    A batch is taken to last as long as the one before it, but not as the first one: most of its time is compilation.

    Args:
        batches: the batches.
        seconds: time for a pass.
        clock: returns the time in seconds.

    Attributes:
        read: number of batches of the shortest pass.
    """

    def __init__(
        self,
        batches: Sequence[Mapping[str, jax.Array]],
        seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._batches, self._seconds, self._clock, self.read = batches, seconds, clock, len(batches)

    def __iter__(self) -> Iterator[Mapping[str, jax.Array]]:
        begin = before = self._clock()
        for number, batch in enumerate(preemption.leaving(self._batches), 1):
            yield batch
            now = self._clock()
            after_next = now if number == 1 else 2 * now - before
            if after_next > begin + self._seconds:
                self.read = min(self.read, number)
                return
            before = now


def increases(
    config: LMMConfig,
    params: Params,
    gates: Mapping[str, Mapping[str, np.ndarray]],
    batches: Iterable[Mapping[str, jax.Array]],
    *,
    dtype: str = "float32",
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, float]:
    """Measures how much the loss on the labels grows when each axis is cut, without training.

    Args:
        config: model config.
        params: model parameters.
        gates: axis -> gates, from `closed`.
        batches: calibration batches, at least one.
        dtype: dtype of computation.
        progress: called with the number of passes over a batch; there is one for each axis, and one without a cut.

    Returns:
        axis -> increase of the mean loss per answer token.
    """
    loss, open_gates = make_loss(functional(config), LossConfig(hard=1.0), dtype=dtype), pruning.ones(config)

    @jax.jit
    def measured(params: Params, gates: Any, batch: Any) -> jax.Array:
        return loss(params, gates, batch, {})[0]

    cuts = {"": {}, **gates}
    totals, count = dict.fromkeys(cuts, 0.0), 0
    for batch in batches:
        for place, (axis, cut) in enumerate(cuts.items(), 1):
            totals[axis] += float(gather(measured(params, {**open_gates, **cut}, batch)))
            progress(count * len(cuts) + place)
        count += 1
    return {axis: (total - totals[""]) / count for axis, total in totals.items() if axis}


def factors(increases: Mapping[str, float], fewer: Mapping[str, float]) -> dict[str, float]:
    """Converts increases of the loss to factors on the weights of axes for `pruning.search`.

    The search prices a cut to a share 1 / n of an axis at its weight times n - 1, so increases are divided by n - 1: an
    axis of two heads can only be halved, others are cut to a quarter. The factor is the root of that, relative to the
    geometric mean of all axes: training repairs large increases better than small ones.

    A width has at most the largest factor of the layers of its side (images, language): without training half of a
    width ruins a model, but training repairs it sooner than missing layers. Of a language model of 6 layers 160 wide, 3
    layers 64 wide came to 0.920 where one layer 128 wide came to 0.805 (docs/lab/tasks.md).

    Args:
        increases: axis -> increase of the loss.
        fewer: axis -> how many times fewer units were left.

    Returns:
        axis -> factor.
    """
    low, high = FACTORS
    logs = {axis: log(max(value, LEAST) / (fewer[axis] - 1)) for axis, value in increases.items()}
    mean = sum(logs.values()) / max(1, len(logs))
    result = {axis: min(high, max(low, exp((value - mean) / 2))) for axis, value in logs.items()}
    for images in (True, False):
        side = {axis for axis in result if on_image_side(axis) == images}
        most = max((result[axis] for axis in side if axis.endswith("/layers")), default=high)
        result |= {axis: min(result[axis], most) for axis in side if axis.endswith("/embed")}
    return result
