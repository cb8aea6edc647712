"""Which shapes a family serves: tied counts and constraints, as data and one small solver."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from antgmm_jax.axes import sizes
from antgmm_jax.config import LMMConfig
from antgmm_jax.errors import AntgmmError


class Tie(NamedTuple):
    """`sizes[a] == factor * sizes[b]`: counts that the file format holds in one field; indices stay free."""

    a: str
    b: str
    factor: int = 1


def complete_ties(ties: tuple[Tie, ...], config: LMMConfig, wanted: Mapping[str, int]) -> dict[str, int]:
    """Fills in every axis whose count follows from the ones stated.

    Args:
        ties: the family's tied counts.
        config: the model.
        wanted: axis name -> size, as stated.

    Returns:
        `wanted` and what follows from it.

    Raises:
        AntgmmError: an unknown axis, or two stated sizes that no shape of the family can have together.
    """
    known = sizes(config)
    unknown = sorted(set(wanted) - set(known))
    if unknown:
        raise AntgmmError(f"unknown axis {', '.join(unknown)}: this model has {', '.join(known)}")
    full, changed = dict(wanted), True
    while changed:
        changed = False
        for a, b, factor in ties:
            if b in full and a not in full:
                full[a], changed = full[b] * factor, True
            elif a in full and b not in full:
                if full[a] % factor:
                    raise AntgmmError(f"{a} = {full[a]} is no multiple of {factor}, the width of one unit of {b}")
                full[b], changed = full[a] // factor, True
            elif a in full and full[a] != full[b] * factor:
                raise AntgmmError(
                    f"{a} = {full[a]} and {b} = {full[b]} cannot stand together: this family needs"
                    f" {a} = {f'{factor} x ' if factor > 1 else ''}{b}"
                )
    return full


def tie_violations(ties: tuple[Tie, ...], config: LMMConfig) -> tuple[str, ...]:
    """The ties that a model's sizes break, each as a sentence; empty where none."""
    now = sizes(config)
    return tuple(
        f"{a} = {now[a]} must be {f'{factor} x ' if factor > 1 else ''}{b} = {now[b]}"
        for a, b, factor in ties
        if now[a] != now[b] * factor
    )


def check_square(image: Any, patch: Any) -> None:
    """Refuses pictures that are no whole number of square patches.

    Args:
        image: `image_size` of a config.json.
        patch: its `patch_size`.

    Raises:
        AntgmmError: names both.
    """
    if not isinstance(image, int) or not isinstance(patch, int) or image % patch:
        raise AntgmmError(f"image_size {image} must be a whole number of patches of {patch} pixels, square")
