"""Tiers (levels of difficulty) of MAAD-synth."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

from antgmm_jax.errors import AntgmmError
from data.maad.vocab import CATEGORIES, CLAIMS, COLOURS, HARMLESS_BADGES, PRODUCTS, SHAPES, SYLLABLES, Product


@dataclass(frozen=True, kw_only=True)
class Tier:
    """Contents of advertisements and how much they vary; lengths are in pixels.

    `jitter` is the fraction of the free space that is distributed at random (0 for even gaps), `plates` the fraction of
    prices on a plate, `clutter` the number of background shapes, `tilt` the maximum rotation of the product in degrees.
    `layouts` and `hard_layouts` are indices of `data.maad.layouts.layout`.
    """

    name: str
    px: int
    categories: int
    per_category: int
    brands: Literal["logo", "word"]
    prices: tuple[int, ...]
    fonts: tuple[str, ...]
    hard_fonts: tuple[str, ...]
    layouts: tuple[int, ...]
    hard_layouts: tuple[int, ...]
    icon_px: tuple[int, ...]
    brand_px: tuple[int, ...]
    price_px: tuple[int, ...]
    small_px: tuple[int, ...]
    jitter: float
    plates: float
    clutter: int
    tilt: int
    fillers: int


class Brand(NamedTuple):
    """A brand: its name in texts (pictures show lower case) and its two parts (shape and colour, or syllables)."""

    name: str
    parts: tuple[int, int]


_LAYOUTS = tuple(range(96))
_FONTS = ("montserrat", "archivo-narrow", "bitter", "oswald", "roboto-slab", "nunito", "inconsolata", "fira-sans")
_HARD_FONTS = ("zilla-slab", "dosis")

TIERS = {
    "s": Tier(
        name="s",
        px=96,
        categories=6,
        per_category=4,
        brands="logo",
        # Changing one digit gives another valid price, so that near misses keep the marginal distribution.
        prices=tuple(10 * tens + ones for tens in range(1, 6) for ones in (2, 4, 5, 9)),
        fonts=("montserrat",),
        hard_fonts=("archivo-narrow",),
        layouts=(0, 9, 36, 49, 66, 75),
        hard_layouts=(82, 90),
        icon_px=(36, 38),
        brand_px=(20,),
        price_px=(18,),
        small_px=(9,),
        jitter=0.15,
        plates=1.0,
        clutter=0,
        tilt=0,
        fillers=1,
    ),
    "m": Tier(
        name="m",
        px=112,
        categories=12,
        per_category=4,
        brands="word",
        prices=tuple(range(5, 1000)),
        fonts=("archivo-narrow", "fira-sans", "nunito"),
        hard_fonts=_HARD_FONTS,
        layouts=(0, 9, 49, 66),
        hard_layouts=(82, 90),
        icon_px=(32, 35, 38),
        brand_px=(13, 16, 17),
        price_px=(18, 20, 21),
        small_px=(9,),
        jitter=0.25,
        plates=1.0,
        clutter=3,
        tilt=8,
        fillers=2,
    ),
    "full": Tier(
        name="full",
        px=224,
        categories=14,
        per_category=6,
        brands="word",
        prices=tuple(range(5, 1000)),
        fonts=_FONTS,
        hard_fonts=_HARD_FONTS,
        layouts=_LAYOUTS[:80],
        hard_layouts=_LAYOUTS[80:],
        icon_px=(60, 70, 80, 90),
        brand_px=(20, 22, 24, 27, 30),
        price_px=(26, 29, 32, 36),
        small_px=(14, 15, 16),
        jitter=1.0,
        plates=0.5,
        clutter=24,
        tilt=20,
        fillers=2,
    ),
}


def tier(name: str) -> Tier:
    """Returns the preset of a tier.

    Args:
        name: `s` (tests), `m` (study on a CPU) or `full` (accelerators).

    Returns:
        The preset.

    Raises:
        AntgmmError: there is no such tier.
    """
    if name not in TIERS:
        raise AntgmmError(f"no tier {name!r} of MAAD-synth: choose one of {', '.join(TIERS)}")
    return TIERS[name]


@lru_cache
def products(preset: Tier) -> tuple[Product, ...]:
    """Returns the products of a tier, grouped by category; latents hold indices into this tuple."""
    groups = ([p for p in PRODUCTS if p.category == c] for c in CATEGORIES[: preset.categories])
    return tuple(p for group in groups for p in group[: preset.per_category])


@lru_cache
def brands(preset: Tier) -> tuple[tuple[Brand, ...], int]:
    """Returns the brands of a tier, those seen in training first, and the number of seen ones.

    Unseen brands are new combinations of seen parts.
    """
    if preset.brands == "logo":
        pairs, names = [(s, c) for s in range(5) for c in range(5)], (SHAPES, tuple(COLOURS))
        pairs.sort(key=lambda p: ((p[1] - p[0] + 1) % 5, p))
        seen = 16
        return tuple(Brand(f"{names[1][c]} {names[0][s]}", (s, c)) for s, c in pairs), seen
    pairs = [(a, b) for a in range(16) for b in range(16) if (a + b) % 8 < 4]
    pairs.sort(key=lambda p: ((p[0] + p[1]) % 8 == 3, p))
    seen = sum((a + b) % 8 < 3 for a, b in pairs)
    return tuple(Brand(SYLLABLES[0][a].title() + SYLLABLES[1][b].title(), (a, b)) for a, b in pairs), seen


@lru_cache
def fact_sizes(preset: Tier) -> dict[str, int]:
    """Returns the number of classes of each fact, in a fixed order; digits of prices have 11, including none."""
    parts = [max(pair) + 1 for pair in zip(*(brand.parts for brand in brands(preset)[0]), strict=True)]
    return {
        "product": len(products(preset)),
        "brand_0": parts[0],
        "brand_1": parts[1],
        **{f"price_{place}": 11 for place in range(len(str(max(preset.prices))))},
        "claim": 1 + len(CLAIMS) + len(HARMLESS_BADGES),
        "qr": 2,
        "phone": 2,
        "notice": 2,
    }
