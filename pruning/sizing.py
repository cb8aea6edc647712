"""The inverse of `cost`: from a budget to legal sizes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

from antgmm_jax.axes import sizes
from antgmm_jax.config import LMMConfig
from antgmm_jax.errors import AntgmmError
from antgmm_jax.families import complete, violations
from pruning.costs import total_parameters
from pruning.planning import fault_of, variants
from pruning.targets import resolve

Price = Callable[[LMMConfig], float]
"""What a model costs, in one figure: no axis that gets smaller may make it dearer."""

WEIGHTS = {"layers": 3.0, "embed": 3.0, "heads": 1.0, "mlp": 1.0}
"""How much an axis counts. A part of the width costs more than the same part of the depth, so at equal weights depth
outlasts width, as it should: small students read better deep than wide. What stands inside a layer goes first."""

STAGES = {"layers": "blocks", "heads": "intermediate", "mlp": "intermediate", "embed": "hidden"}
"""The paper's stage that cuts an axis, in their order."""


class Sized(NamedTuple):
    """Sizes that a search found.

    Attributes:
        sizes: axis -> units: of each group of tied axes one, and those that were pinned.
        config: the model that a cut to them leaves.
        price: its price.
    """

    sizes: dict[str, int]
    config: LMMConfig
    price: float


def search(
    config: LMMConfig,
    price: Price,
    budget: float,
    *,
    pins: Mapping[str, int | float] | None = None,
    weights: Mapping[str, float] | None = None,
) -> Sized:
    """The sizes within a budget that take least from a model.

    What a cut takes is the sum over axes of weight times how many times smaller each gets. From the model down, one
    axis at a time goes to its next legal size, always the one that saves most for what it takes, until the price is
    within the budget; then what still fits is given back, best merit first. The order depends on the model and the
    price alone: a larger budget never finds a cheaper model, and no axis of what is found could be one size larger.

    Args:
        config: the model that is cut.
        price: what is to be saved.
        budget: the most that it may be.
        pins: axis -> units, or (a float) the fraction of the present size: sizes that are not searched.
        weights: tower -> factor on the weights of its axes; 1 for one not named.

    Returns:
        The sizes; the model's own (with the pins) where these are within the budget, the smallest legal ones, over the
        budget, where none are.

    Raises:
        AntgmmError: an unknown axis or tower, or pins that no legal model has.
    """
    pinned, present = resolve(config, pins or {}), sizes(config)
    weigh = _weights(config, free_axes(config, complete(config, pinned)), weights or {})

    def sized(wanted: dict[str, int]) -> Sized:
        # Where only some layers have cross-attention, scores decide how many of those stay: at most these.
        legal = [variant for variant in variants(config, complete(config, wanted)) if not violations(variant)]
        largest = max(legal, key=total_parameters)
        return Sized(wanted, largest, price(largest))

    def merit(larger: Sized, smaller: Sized, axis: str) -> float:
        taken = weigh[axis] * present[axis] * (1 / smaller.sizes[axis] - 1 / larger.sizes[axis])
        return (larger.price - smaller.price) / taken

    here = sized({axis: present[axis] for axis in weigh} | pinned)
    passed: dict[str, list[int]] = {axis: [] for axis in weigh}
    while here.price > budget:
        down = {axis: sized({**here.sizes, axis: n}) for axis in weigh if (n := below(config, here.sizes, axis))}
        if not down:
            return here
        axis = max(down, key=lambda axis: merit(here, down[axis], axis))
        passed[axis].append(here.sizes[axis])
        here = down[axis]
    while True:
        back = {axis: {**here.sizes, axis: before[-1]} for axis, before in passed.items() if before}
        up = {axis: sized(wanted) for axis, wanted in back.items() if not fault_of(config, wanted)}
        fits = [axis for axis, found in up.items() if found.price <= budget]
        if not fits:
            return here
        axis = min(fits, key=lambda axis: merit(up[axis], here, axis))
        passed[axis].pop()
        here = up[axis]


def free_axes(config: LMMConfig, held: Collection[str] = ()) -> list[str]:
    """One axis of each group of tied ones; the others follow from it.

    Args:
        config: the model.
        held: axes whose groups are left out.

    Returns:
        Axes in the order of `sizes`.
    """
    found, seen = [], set(held)
    for axis, size in sizes(config).items():
        group = set(complete(config, {axis: size}))
        if not group & seen:
            found.append(axis)
        seen |= group
    return found


def below(config: LMMConfig, at: Mapping[str, int], axis: str) -> int:
    """The next size down that the search considers.

    Sizes have three significant bits (7, 8, 10, 12, 14, 16, 20 ...: steps of 13 to 20 %, at numbers that hardware
    likes), or are the nearest legal ones above such.

    Args:
        config: the model that is cut.
        at: axis -> units, legal.
        axis: one of them.

    Returns:
        Units; 0 where no legal size is left.
    """
    size = at[axis] - 1
    while size > 0:
        shift = max(size.bit_length() - 3, 0)
        size = size >> shift << shift
        legal = next((n for n in range(size, at[axis]) if not fault_of(config, {**at, axis: n})), 0)
        if legal:
            return legal
        size -= 1
    return 0


def by_stage(config: LMMConfig, wanted: Mapping[str, int]) -> dict[str, dict[str, int]]:
    """Sizes by the paper's stages: blocks, intermediate dimensions, hidden dimensions.

    Args:
        config: the model that is cut.
        wanted: axis -> units, legal together.

    Returns:
        stage -> axis -> units, of the axes that get smaller; a stage that would cut nothing is left out.
    """
    smaller = {axis: n for axis, n in wanted.items() if n < sizes(config)[axis]}
    stages: dict[str, dict[str, int]] = {stage: {} for stage in STAGES.values()}
    for axis, n in smaller.items():
        stage = STAGES[axis.split("/")[1].removeprefix("cross_")]
        # What is legal only beside a smaller width goes with it: heads, for one, that do not divide the full width.
        alone = stage != "intermediate" or not fault_of(config, {axis: n})
        stages[stage if alone else "hidden"][axis] = n
    return {stage: found for stage, found in stages.items() if found}


def _weights(config: LMMConfig, axes: Collection[str], towers: Mapping[str, float]) -> dict[str, float]:
    known = list(dict.fromkeys(axis.split("/")[0] for axis in sizes(config)))
    if unknown := sorted(set(towers) - set(known)):
        raise AntgmmError(f"unknown tower {unknown[0]!r}: this model has {', '.join(known)}")
    return {axis: towers.get(axis.split("/")[0], 1.0) * WEIGHTS[axis.split("/")[1]] for axis in axes}
