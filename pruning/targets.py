"""Target sizes of a recipe: conversion to counts, validation, and the resulting configs."""

from collections.abc import Mapping

from antgmm_jax.axes import sizes
from antgmm_jax.config import LMMConfig
from antgmm_jax.errors import AntgmmError
from antgmm_jax.families import complete, violations
from pruning.planning import explain_illegal, illegal_reason, size_of, variants


def resolve(config: LMMConfig, targets: Mapping[str, int | float]) -> dict[str, int]:
    """Converts target sizes to numbers of units and checks that they are legal.

    Args:
        config: model config.
        targets: axis -> number of units to keep, or (float) the fraction to keep.

    Returns:
        axis -> units, for the axes of `targets`.

    Raises:
        AntgmmError: an unknown axis, a size above the current one, or an illegal size (names the nearest legal ones).
    """
    wanted = {axis: size_of(axis, target, sizes(config)) for axis, target in targets.items()}
    if reason := illegal_reason(config, wanted):
        raise AntgmmError(explain_illegal(config, wanted, reason))
    return wanted


def legal_above(config: LMMConfig, wanted: Mapping[str, int]) -> dict[str, int]:
    """Increases illegal sizes to the next legal ones, axis by axis.

    Args:
        config: model config.
        wanted: axis -> units.

    Returns:
        axis -> units; `wanted` itself if it is legal.

    Raises:
        AntgmmError: there are no larger legal sizes.
    """
    # Axes that constrain each other (T5's two depths) may be legal only together.
    if not illegal_reason(config, wanted):
        return dict(wanted)
    order, moved = list(wanted), set()
    while True:
        result, without = _raised(config, {axis: wanted[axis] for axis in order})
        if without is None:
            return {axis: result[axis] for axis in wanted}
        if without in moved:
            raise AntgmmError(
                f"{without} has no legal size of {wanted[without]} or more with {result}: use fewer segments"
            )
        # An axis before it has decided its size: raised first, it decides.
        moved.add(without)
        order = [without, *(axis for axis in order if axis != without)]


def _raised(config: LMMConfig, wanted: Mapping[str, int]) -> tuple[dict[str, int], str | None]:
    """Legal sizes of the axes up to one that has none, and this axis; None if all have one."""
    result: dict[str, int] = {}
    for axis, count in wanted.items():
        candidates = range(count, sizes(config)[axis] + 1)
        legal = next((n for n in candidates if not illegal_reason(config, {**result, axis: n})), None)
        if legal is None:
            return result, axis
        result[axis] = legal
    return result, None


def planned_configs(config: LMMConfig, wanted: Mapping[str, int]) -> list[LMMConfig]:
    """Returns the configs that pruning to these sizes may result in.

    Args:
        config: model config.
        wanted: axis -> units, legal; tied axes may be missing.

    Returns:
        Configs of the pruned model; several if scores decide how many layers with cross-attention are kept.
    """
    return [c for c in variants(config, complete(config, wanted)) if not violations(c)]


def planned_config(config: LMMConfig, wanted: Mapping[str, int]) -> LMMConfig:
    """Returns the config of a model pruned to these sizes: the first of `planned_configs`.

    Args:
        config: model config.
        wanted: axis -> units, legal.

    Returns:
        Config of the pruned model, with the current frequency of cross-attention if possible.
    """
    return planned_configs(config, wanted)[0]
