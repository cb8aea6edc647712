"""Latents of advertisements: random contents that the image, text and answer are generated from."""

import random
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple
from zlib import crc32

from antgmm_jax.errors import AntgmmError
from data.maad.answers import CLASSES, accompanying
from data.maad.tiers import Tier, brands, products
from data.maad.vocab import BANNED, CLAIMS, FILLERS, HARMLESS_BADGES, LOOKALIKES, NEEDS_NOTICE, OPENINGS, SLOGANS, TYPES

SIZES = {"train": 16000, "val": 1000, "test": 3000, "test_hard": 3000}
SLICES = ("font", "icons", "layout", "brand", "claim", "jpeg")
PALETTES = 8
# Tenths of the hash space of image contents and texts, so that splits cannot share an advertisement.
_SHARES = {"train": range(7), "val": range(7, 8), "test": range(8, 9), "test_hard": range(9, 10)}


class Picture(NamedTuple):
    """Content of the image. `claim`: 0 for none, 1-4 for a forbidden claim, 5-8 for a harmless badge."""

    product: int
    brand: int
    price: int
    claim: int
    qr: bool
    phone: bool
    notice: bool


class Text(NamedTuple):
    """Content of the accompanying text, and its wording as indices of phrases."""

    product: int
    brand: int
    price: int
    claim: int
    notice: bool
    wording: tuple[int, ...]


class Style(NamedTuple):
    """Style of the image; `noise` is the seed of everything else."""

    layout: int
    palette: int
    font: str
    icons: str
    slogan: int
    noise: int


@dataclass(frozen=True)
class Latents:
    """An advertisement and the question about it. In `test_hard`, `slice` names the property that does not occur in
    training (for "claim", the wording of a claim in the text); else it is ""."""

    type: str
    picture: Picture
    text: Text
    style: Style
    slice: str


class Wish(NamedTuple):
    """Constraints that the answer class imposes on the latents; None for no constraint."""

    products: tuple[int, ...] | None = None
    brand: int | None = None
    price: int | None = None
    same: tuple[bool | None, bool | None, bool | None] = (None, None, None)  # product, brand, price
    free: tuple[bool, bool, bool] = (False, False, False)  # the text's field is independent of the image's
    claims: tuple[bool | None, bool | None] = (None, None)  # picture, text
    contact: tuple[bool, bool] | None = None  # QR code, phone
    notice: bool | None = None


@lru_cache
def _pools(tier: Tier) -> dict[str, tuple[int, ...]]:
    """Product indices by category and by rule."""
    items = products(tier)
    pools = {c: tuple(i for i, p in enumerate(items) if p.category == c) for c in {p.category for p in items}}
    rules = {"banned": BANNED, "notice": NEEDS_NOTICE}
    for rule, categories in rules.items():
        pools[rule] = tuple(i for i, p in enumerate(items) if p.category in categories)
        pools[f"not {rule}"] = tuple(i for i, p in enumerate(items) if p.category not in categories)
    pools["legal notice"] = tuple(i for i in pools["notice"] if i in pools["not banned"])
    pools["legal exempt"] = tuple(i for i in pools["not banned"] if i in pools["not notice"])
    return pools


def _verdict(tier: Tier, answer: str, rng: random.Random) -> Wish:
    """Constraints for a verdict: earlier rules hold, the answer's rule is broken, later rules are random."""
    pools, rank = _pools(tier), 8 if answer == "pass" else int(answer[1])
    if rank == 1:
        return Wish(products=pools["banned"])
    claims: tuple[bool | None, bool | None] = (False, False)
    if rank == 2:
        claims = ((True, False), (False, True), (True, True))[int(rng.random() * 3)]
    product, brand, price = (None if rank < at else rank != at for at in (4, 5, 3))
    # Rule 6 depends on the notice; half of the products that pass it need a notice and have one.
    group = "legal notice" if rank == 6 or rng.random() < 0.5 else "legal exempt"
    notice = None if rank < 6 else rank != 6 if group == "legal notice" else None
    contact = None if rank < 7 else (False, False) if rank == 8 else _CONTACTS[1 + int(rng.random() * 3)]
    same = (product, brand, price)
    return Wish(products=pools[group], same=same, claims=claims, notice=notice, contact=contact)


_CONTACTS = ((False, False), (True, False), (False, True), (True, True))


def _wish(tier: Tier, kind: str, turn: int, hard_brand: bool, rng: random.Random) -> Wish:
    """Constraints of the `turn`-th question of a type. Classes alternate, so that every split is balanced."""
    pools = _pools(tier)
    if kind == "product":
        return Wish(products=(turn % len(products(tier)),), free=(True, False, False))
    if kind == "price":
        return Wish(price=tier.prices[turn % len(tier.prices)], free=(False, False, True))
    if kind == "brand":
        everything, seen = brands(tier)
        brand = seen + turn % (len(everything) - seen) if hard_brand else turn % seen
        return Wish(brand=brand, free=(False, True, False))
    classes = CLASSES[kind] if kind != "category" else sorted({p.category for p in products(tier)})
    answer = classes[turn % len(classes)]
    if kind == "category":
        return Wish(products=pools[answer], free=(True, False, False))
    if kind.endswith("_match"):
        fields = ("product_match", "brand_match", "price_match")
        product, brand, price = (answer == "yes" if kind == field else None for field in fields)
        return Wish(same=(product, brand, price))
    if kind == "claim":
        return Wish(claims=(answer in ("picture", "both"), answer in ("text", "both")))
    if kind == "contact":
        return Wish(contact=_CONTACTS[classes.index(answer)])
    if kind == "prohibited":
        return Wish(products=pools["banned" if answer == "yes" else "not banned"], free=(True, False, False))
    if kind == "risk_notice":
        group = "not notice" if answer == "exempt" else "notice"
        notice = None if answer == "exempt" else answer == "present"
        return Wish(products=pools[group], free=(True, False, False), notice=notice)
    return _verdict(tier, answer, rng)


def _other_price(tier: Tier, price: int, rng: random.Random) -> int:
    """A different price; half of the time it differs in one digit."""
    if rng.random() < 0.5:
        digits = str(price)
        at = int(rng.random() * len(digits))
        changed = int(digits[:at] + str(int(rng.random() * 10)) + digits[at + 1 :])
        if changed != price and len(str(changed)) == len(digits) and changed in _price_set(tier):
            return changed
    return _other(tier.prices, price, rng)


@lru_cache
def _price_set(tier: Tier) -> frozenset[int]:
    return frozenset(tier.prices)


def _other(pool, value, rng: random.Random):
    """A member of the pool that is not `value`."""
    while True:
        candidate = pool[int(rng.random() * len(pool))]
        if candidate != value:
            return candidate


def _field(pool, value, same: bool | None, free: bool, rng: random.Random):
    """The text's value of a field of the image."""
    if free:
        return pool[int(rng.random() * len(pool))]
    if same is None:
        same = rng.random() < 0.5
    return value if same else _other(pool, value, rng)


def _picture(tier: Tier, wish: Wish, brand_pool, rng: random.Random) -> Picture:
    chance = rng.random
    pool = wish.products if wish.products is not None else range(len(products(tier)))
    forbidden = chance() < 0.3 if wish.claims[0] is None else wish.claims[0]
    if forbidden:
        claim = 1 + int(chance() * len(CLAIMS))
    else:
        claim = 0 if chance() < 0.5 else 1 + len(CLAIMS) + int(chance() * len(HARMLESS_BADGES))
    qr, phone = wish.contact if wish.contact is not None else _CONTACTS[int(chance() * 4)]
    return Picture(
        pool[int(chance() * len(pool))],
        brand_pool[int(chance() * len(brand_pool))] if wish.brand is None else wish.brand,
        tier.prices[int(chance() * len(tier.prices))] if wish.price is None else wish.price,
        claim,
        qr,
        phone,
        chance() < 0.4,
    )


def _text(tier: Tier, wish: Wish, picture: Picture, brand_pool, rng: random.Random) -> tuple[Picture, Text]:
    """Draws the accompanying text; a required risk notice is in the image, in the text, or in both."""
    chance = rng.random
    forbidden = chance() < 0.3 if wish.claims[1] is None else wish.claims[1]
    notice = chance() < 0.4
    if wish.notice is not None:
        where = ((False, False),) if not wish.notice else ((True, False), (False, True), (True, True))
        shown, notice = where[int(chance() * len(where))]
        picture = picture._replace(notice=shown)
    if (wish.same[2] is None and not wish.free[2]) or wish.same[2] is False:
        same = wish.same[2] is None and chance() < 0.5
        price = picture.price if same else _other_price(tier, picture.price, rng)
    else:
        price = _field(tier.prices, picture.price, wish.same[2], wish.free[2], rng)
    return picture, Text(
        _field(range(len(products(tier))), picture.product, wish.same[0], wish.free[0], rng),
        _field(brand_pool, picture.brand, wish.same[1], wish.free[1], rng),
        price,
        1 + int(chance() * len(CLAIMS)) if forbidden else 0,
        notice,
        (),
    )


def _wording(tier: Tier, unseen_claims: bool, rng: random.Random) -> tuple[int, ...]:
    """Opening, first filler, further filler, claim wording, notice wording, order of the sentences."""
    chance = rng.random
    ordinary = len(FILLERS) + len(LOOKALIKES)
    first = ordinary if unseen_claims and chance() < 0.5 else int(chance() * ordinary)
    # A different filler than the first.
    second = (first + 1 + int(chance() * (len(FILLERS) - 1))) % len(FILLERS) if tier.fillers > 1 else -1
    claim = 3 if unseen_claims else int(chance() * 3)
    return int(chance() * len(OPENINGS)), first, second, claim, int(chance() * 3), int(chance() * 6)


def share(key: Picture) -> int:
    """Returns the tenth of the hash space (0 to 9) that contains an image's content."""
    number = ((key.product << 9 | key.brand) << 10 | key.price) << 7
    number |= key.claim << 3 | key.qr << 2 | key.phone << 1 | key.notice
    # Fibonacci hashing; the high half of a 64-bit product is well mixed.
    return ((number * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF) >> 32) % 10


def draw(tier: Tier, split: str, index: int, seed: int = 0) -> Latents:
    """Draws the latents of an advertisement; equal arguments give equal latents on every machine.

    Question types and answer classes alternate with the index, so that any prefix of a split is balanced.

    Args:
        tier: the preset.
        split: `train`, `val`, `test` or `test_hard`.
        index: row of the split, from 0; unlimited for `train`.
        seed: seed of the data set; it does not change which contents belong to which split.

    Returns:
        The latents.

    Raises:
        AntgmmError: there is no such split.
    """
    if split not in SIZES:
        raise AntgmmError(f"no split {split!r} of MAAD-synth: choose one of {', '.join(SIZES)}")
    rng = random.Random(f"{tier.name}/{seed}/{split}/{index}")
    kind, turn = TYPES[index % len(TYPES)], index // len(TYPES)
    unseen = ""
    if split == "test_hard":
        unseen, turn = SLICES[turn % len(SLICES)], turn // len(SLICES)
    everything, seen = brands(tier)
    brand_pool = range(seen, len(everything)) if unseen == "brand" else range(seen)
    while True:
        wish = _wish(tier, kind, turn, unseen == "brand", rng)
        picture, text = _text(tier, wish, _picture(tier, wish, brand_pool, rng), brand_pool, rng)
        if share(picture) in _SHARES[split]:
            break
    while True:
        text = text._replace(wording=_wording(tier, unseen == "claim", rng))
        if crc32(accompanying(tier, text).lower().encode()) % 10 in _SHARES[split]:
            break
    layouts = tier.hard_layouts if unseen == "layout" else tier.layouts
    fonts = tier.hard_fonts if unseen == "font" else tier.fonts
    style = Style(
        layouts[int(rng.random() * len(layouts))],
        int(rng.random() * PALETTES),
        fonts[int(rng.random() * len(fonts))],
        "fluent" if unseen == "icons" else "noto",
        int(rng.random() * len(SLOGANS)),
        int(rng.random() * 2**32),
    )
    return Latents(kind, picture, text, style, unseen)
