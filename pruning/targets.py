"""Sizes that a recipe asks for: counted, checked, and walked to in legal steps."""

from __future__ import annotations

from collections.abc import Mapping

from antgmm_jax.axes import sizes
from antgmm_jax.config import LMMConfig
from antgmm_jax.errors import AntgmmError
from antgmm_jax.families import complete, violations
from pruning.planning import advice, fault_of, size_of, variants


def resolve(config: LMMConfig, targets: Mapping[str, int | float]) -> dict[str, int]:
    """Counts of the stated sizes, after checking that a legal model has them.

    Args:
        config: the model that is cut.
        targets: axis -> units to keep, or (a float) the fraction of the present size.

    Returns:
        axis -> units, for the stated axes.

    Raises:
        AntgmmError: an unknown axis, one that would grow, or an illegal size (naming the nearest legal ones).
    """
    wanted = {axis: size_of(axis, target, sizes(config)) for axis, target in targets.items()}
    if fault := fault_of(config, wanted):
        raise AntgmmError(advice(config, wanted, fault))
    return wanted


def legal_above(config: LMMConfig, wanted: Mapping[str, int]) -> dict[str, int]:
    """The sizes given where they are legal together, else the smallest legal ones above, axis by axis in their order.

    Args:
        config: the model that is cut.
        wanted: axis -> units.

    Returns:
        axis -> units.

    Raises:
        AntgmmError: no legal sizes above.
    """
    # Axes that bound each other (T5's two depths) may be legal only together.
    if not fault_of(config, wanted):
        return dict(wanted)
    found: dict[str, int] = {}
    for axis, count in wanted.items():
        candidates = (n for n in range(count, sizes(config)[axis] + 1) if not fault_of(config, {**found, axis: n}))
        legal = next(candidates, None)
        if legal is None:
            raise AntgmmError(f"no legal size of {axis} from {count} up, with {found}: use fewer segments")
        found[axis] = legal
    return found


def planned_configs(config: LMMConfig, wanted: Mapping[str, int]) -> list[LMMConfig]:
    """The configs that a cut to these sizes may leave, tied axes included.

    Args:
        config: the model that is cut.
        wanted: axis -> units, legal.

    Returns:
        The smaller configs: more than one where scores decide which layers are kept, those with cross-attention or
        others.
    """
    return [c for c in variants(config, complete(config, wanted)) if not violations(c)]


def planned_config(config: LMMConfig, wanted: Mapping[str, int]) -> LMMConfig:
    """The config that a cut to these sizes leaves, before scores are known: the first of `planned_configs`.

    Args:
        config: the model that is cut.
        wanted: axis -> units, legal.

    Returns:
        The smaller config, its cross-attention as frequent as the model's where it may be.
    """
    return planned_configs(config, wanted)[0]
