"""Constraints on the sizes of a model that its file format imposes."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from antgmm_jax.axes import sizes
from antgmm_jax.config import LMMConfig
from antgmm_jax.errors import AntgmmError


class Tie(NamedTuple):
    """The constraint `sizes[a] == factor * sizes[b]`: one field of the file holds both. Kept indices may differ."""

    a: str
    b: str
    factor: int = 1


def complete_ties(ties: tuple[Tie, ...], config: LMMConfig, wanted: Mapping[str, int]) -> dict[str, int]:
    """Adds the sizes of axes that are tied to the given ones.

    Args:
        ties: constraints of the family.
        config: model config.
        wanted: axis name -> size.

    Returns:
        `wanted` with the tied axes added.

    Raises:
        AntgmmError: an unknown axis, or sizes that conflict.
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
                    raise AntgmmError(f"{a} = {full[a]} is not a multiple of {factor}, the width of one unit of {b}")
                full[b], changed = full[a] // factor, True
            elif a in full and full[a] != full[b] * factor:
                raise AntgmmError(
                    f"{a} = {full[a]} and {b} = {full[b]} conflict: this family needs"
                    f" {a} = {f'{factor} x ' if factor > 1 else ''}{b}"
                )
    return full


def tie_violations(ties: tuple[Tie, ...], config: LMMConfig) -> tuple[str, ...]:
    """Returns a sentence for every constraint that a model violates."""
    now = sizes(config)
    return tuple(
        f"{a} = {now[a]} must be {f'{factor} x ' if factor > 1 else ''}{b} = {now[b]}"
        for a, b, factor in ties
        if now[a] != now[b] * factor
    )


def check_square(image: Any, patch: Any) -> None:
    """Checks that images and patches are square; pixels that are left of a last patch are not read.

    Args:
        image: `image_size` of a config.json.
        patch: its `patch_size`.

    Raises:
        AntgmmError: they are not.
    """
    if not isinstance(image, int) or not isinstance(patch, int) or image < patch:
        raise AntgmmError(f"image_size = {image} and patch_size = {patch} must be one number each, and a patch fit")
