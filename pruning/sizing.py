"""Search for the sizes of a model within a budget."""

from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

from antgmm_jax.axes import sizes
from antgmm_jax.config import LMMConfig
from antgmm_jax.errors import AntgmmError
from antgmm_jax.families import complete, violations
from pruning.costs import total_parameters
from pruning.planning import illegal_reason, variants
from pruning.targets import resolve

Price = Callable[[LMMConfig], float]
"""Model config -> cost as one number; it must not increase when an axis gets smaller."""

WEIGHTS = {"layers": 3.0, "embed": 3.0, "heads": 1.0, "mlp": 1.0}
"""Weight of each kind of axis. Layers and widths have equal weights; since width saves more than depth, width is
pruned more, as small students are better deep than wide. Heads and MLP units inside a layer are pruned first."""

ALIGNED = 8
"""Sizes above the square of this number are multiples of it where that is legal."""

STAGES = {"layers": "blocks", "heads": "intermediate", "mlp": "intermediate", "embed": "hidden"}
"""Kind of axis -> stage of the paper that prunes it, in order."""


class Sized(NamedTuple):
    """The result of a search.

    Attributes:
        sizes: axis -> units, for one axis of each tied group and the pinned axes.
        config: config of the pruned model.
        price: its cost.
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
    value: Price | None = None,
    multiple: int = 0,
    least: Mapping[str, int] | None = None,
) -> Sized:
    """Searches for the sizes within a budget that prune a model least.

    The loss of a pruning is the sum over axes of weight x (old size / new size). A greedy search repeatedly reduces the
    axis with the best ratio of saving to loss to its next legal size until the price is within the budget, then undoes
    reductions that still fit. The order depends only on the model and the price: a larger budget never results in a
    cheaper model, and no axis of the result could be one step larger.

    Args:
        config: model config.
        price: cost to reduce.
        budget: maximum cost.
        pins: axis -> fixed number of units, or (float) fixed fraction of the current size.
        weights: tower or axis -> factor on the weights of its axes; 1 by default.
        value: config -> cost that a reduction should save, such as parameters and latency together; `price` by default.
        multiple: number of which widths and MLP units are multiples; 0 if any will do.
        least: axis -> size below which it is cut only if nothing else is left to cut.

    Returns:
        The sizes. The current sizes (with the pins) if they are within the budget; the smallest legal sizes, which
        exceed the budget, if none are within it.

    Raises:
        AntgmmError: an unknown axis or tower, illegal pins, or a weight of what follows another axis.
    """
    pinned, present = resolve(config, pins or {}), sizes(config)
    weight_of = _weights(config, free_axes(config, complete(config, pinned)), weights or {})

    def sized(wanted: dict[str, int]) -> Sized:
        # If only some layers have cross-attention, scores decide how many of them are kept: assume the most.
        legal = [variant for variant in variants(config, complete(config, wanted)) if not violations(variant)]
        largest = max(legal, key=total_parameters)
        return Sized(wanted, largest, price(largest))

    def merit(larger: Sized, smaller: Sized, axis: str) -> float:
        loss = weight_of[axis] * present[axis] * (1 / smaller.sizes[axis] - 1 / larger.sizes[axis])
        saved = larger.price - smaller.price if value is None else value(larger.config) - value(smaller.config)
        return saved / loss

    current = sized({axis: present[axis] for axis in weight_of} | pinned)
    larger_sizes: dict[str, list[int]] = {axis: [] for axis in weight_of}
    floors = dict(least or {})
    while current.price > budget:
        reductions = {
            axis: sized({**current.sizes, axis: n})
            for axis in weight_of
            if (n := next_smaller(config, current.sizes, axis, multiple)) >= max(1, floors.get(axis, 1))
        }
        if not reductions and floors:
            floors = {}
            continue
        if not reductions:
            return current
        axis = max(reductions, key=lambda axis: merit(current, reductions[axis], axis))
        larger_sizes[axis].append(current.sizes[axis])
        current = reductions[axis]
    while True:
        back = {axis: {**current.sizes, axis: before[-1]} for axis, before in larger_sizes.items() if before}
        increases = {axis: sized(wanted) for axis, wanted in back.items() if not illegal_reason(config, wanted)}
        fits = [axis for axis, larger in increases.items() if larger.price <= budget]
        if not fits:
            return current
        axis = min(fits, key=lambda axis: merit(increases[axis], current, axis))
        larger_sizes[axis].pop()
        current = increases[axis]


def free_axes(config: LMMConfig, held: Collection[str] = ()) -> list[str]:
    """Returns one axis of each group of tied axes.

    Args:
        config: model config.
        held: groups that contain one of these axes are left out.

    Returns:
        Axes in the order of `sizes`.
    """
    free, seen = [], set(held)
    for axis, size in sizes(config).items():
        group = set(complete(config, {axis: size}))
        if not group & seen:
            free.append(axis)
        seen |= group
    return free


def next_smaller(config: LMMConfig, at: Mapping[str, int], axis: str, multiple: int = 0) -> int:
    """Returns the next smaller size that the search considers.

    Sizes have three significant bits (7, 8, 10, 12, 14, 16, 20 ...: steps of 13 to 20 %, efficient on hardware), or are
    the nearest legal sizes above: of `ALIGNED` units where there is a smaller one, because a width of 450 costs a
    matrix unit what 512 do.

    Args:
        config: model config.
        at: axis -> current legal size.
        axis: axis to reduce.
        multiple: number of which a width or a number of MLP units is a multiple; 0 if any will do.

    Returns:
        The size; 0 if there is no smaller legal size.
    """
    units = (ALIGNED, 1) if at[axis] > ALIGNED**2 else (1,)
    for unit in (multiple,) if multiple and axis.endswith(("embed", "mlp")) else units:
        size = at[axis] - 1
        while size > 0:
            shift = max(size.bit_length() - 3, 0)
            size = size >> shift << shift
            multiples = range(-(-size // unit) * unit, at[axis], unit)
            if legal := next((n for n in multiples if not illegal_reason(config, {**at, axis: n})), 0):
                return legal
            size -= 1
    return 0


def by_stage(config: LMMConfig, wanted: Mapping[str, int]) -> dict[str, dict[str, int]]:
    """Groups target sizes by the paper's stages: blocks, intermediate dimensions, hidden dimensions.

    Args:
        config: model config.
        wanted: axis -> units, legal together.

    Returns:
        stage -> axis -> units, without axes that keep their size and empty stages.
    """
    smaller = {axis: n for axis, n in wanted.items() if n < sizes(config)[axis]}
    stages: dict[str, dict[str, int]] = {stage: {} for stage in STAGES.values()}
    for axis, n in smaller.items():
        stage = STAGES[axis.split("/")[1].rpartition("_")[2]]
        # Sizes that are legal only with a smaller width (such as heads that do not divide the full width) go with it.
        alone = stage != "intermediate" or not illegal_reason(config, {axis: n})
        stages[stage if alone else "hidden"][axis] = n
    return {stage: axes for stage, axes in stages.items() if axes}


def _weights(config: LMMConfig, axes: Collection[str], factors: Mapping[str, float]) -> dict[str, float]:
    present = sizes(config)
    known = list(dict.fromkeys(axis.split("/")[0] for axis in present))
    if unknown := sorted(set(factors) - {*known, *present}):
        kind, names = ("axis", [*present]) if "/" in unknown[0] else ("tower", known)
        raise AntgmmError(f"unknown {kind} {unknown[0]!r}: this model has {', '.join(names)}")
    weighed = {axis.split("/")[0] for axis in axes}
    for free in axes:
        for axis in {*complete(config, {free: present[free]})} - {free}:
            for name in {axis, axis.split("/")[0]} & {*factors} - weighed:
                raise AntgmmError(f"the weight of {name!r} has no effect: {axis} follows {free}, so weigh {free}")

    def weight(axis: str) -> float:
        tower, kind = axis.split("/")
        return factors.get(tower, 1.0) * factors.get(axis, 1.0) * WEIGHTS[kind]

    return {axis: weight(axis) for axis in axes}
