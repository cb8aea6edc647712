"""Draws an advertisement from its latents, with Pillow."""

import io
import random

from PIL import Image, ImageFilter

from data.maad import sprites
from data.maad.latents import Latents
from data.maad.layouts import Box, place
from data.maad.sprites import Sprite
from data.maad.tiers import Tier, brands, products
from data.maad.vocab import CLAIMS, HARMLESS_BADGES, SLOGANS

_WHITE = (255, 255, 255)
_NOTICE = "MIND RISKS"


def _pick(pool, rng: random.Random):
    return pool[int(rng.random() * len(pool))]


def _phone(noise: int) -> str:
    """One of 64 numbers: few enough to be drawn once each."""
    return f"tel {2000 + noise % 64 * 123}"


def _badge(claim: int) -> str:
    """The word on the badge; without a claim, one that only keeps its place."""
    return ("SALE", *(c.badge for c in CLAIMS), *HARMLESS_BADGES)[claim]


def _parts(tier: Tier, latents: Latents, rng: random.Random) -> dict[str, Sprite]:
    """Every element's sprite, drawn or not: an absent one keeps its place, so presence moves nothing."""
    picture, style = latents.picture, latents.style
    palette, brand = sprites.PALETTES[style.palette], brands(tier)[0][picture.brand]
    small, scale = _pick(tier.small_px, rng), max(1, tier.px // 100)
    # A multiple of four degrees: few enough rotations to keep each.
    tilt = round((2 * rng.random() - 1) * tier.tilt / 4) * 4
    parts = {
        "icon": sprites.icon(products(tier)[picture.product].name, style.icons, _pick(tier.icon_px, rng), tilt),
        "qr": sprites.code(style.noise, scale),
        "phone": Sprite(palette.ink, sprites.words(_phone(style.noise), style.font, small)),
        "notice": sprites.plate(_NOTICE, style.font, small - 1, _WHITE, palette.ink),
        "slogan": Sprite(palette.ink, sprites.words(SLOGANS[style.slogan], style.font, small)),
        "badge": sprites.plate(_badge(picture.claim), style.font, small, palette.accent, _WHITE),
    }
    side = _pick(tier.brand_px, rng)
    if tier.brands == "logo":
        parts["brand"] = sprites.logo(*brand.parts, side)
    else:
        # Between plate and word colour: a tint of its own that stays dark enough on the palest background.
        red, green, blue = ((a + b) // 2 for a, b in zip(palette.ink, palette.accent, strict=True))
        parts["brand"] = Sprite((red, green, blue), sprites.words(brand.name.lower(), style.font, side))
    price, px = f"${picture.price}", _pick(tier.price_px, rng)
    if rng.random() < tier.plates:
        parts["price"] = sprites.plate(price, style.font, px, palette.ink, _WHITE)
    else:
        parts["price"] = Sprite(palette.ink, sprites.words(price, style.font, px))
    return parts


def compose(tier: Tier, latents: Latents) -> tuple[Image.Image, dict[str, Box]]:
    """Draws an advertisement and says where everything stands.

    Args:
        tier: the preset.
        latents: the advertisement.

    Returns:
        The picture, and the box of each element that is drawn.
    """
    picture, style = latents.picture, latents.style
    rng = random.Random(style.noise)
    boxes, tries = None, 0
    while boxes is None:
        # Wide words and big sizes may not fit together; other sizes are drawn then.
        parts, tries = _parts(tier, latents, rng), tries + 1
        boxes = place(style.layout, {name: part.size for name, part in parts.items()}, tier.px, tier.jitter, rng)
        if tries == 1000:
            raise ValueError(f"tier {tier.name}: no sizes of the preset fit {latents}")
    image = sprites.ground(style.palette, tier.px).copy()
    if tier.clutter:
        sprites.clutter(image, style.palette, tier.clutter, rng)
    shown = {"qr": picture.qr, "phone": picture.phone, "notice": picture.notice, "badge": picture.claim > 0}
    drawn = {name: box for name, box in boxes.items() if shown.get(name, True)}
    for name, box in drawn.items():
        image.paste(parts[name].ink, box, parts[name].mask)
    if latents.slice == "jpeg":
        image = _worn(image, rng)
    return image, drawn


def _worn(image: Image.Image, rng: random.Random) -> Image.Image:
    """A picture as it comes back from the wild: slightly blurred, strongly compressed."""
    stream = io.BytesIO()
    blurred = image.filter(ImageFilter.GaussianBlur(0.3 + 0.4 * rng.random()))
    blurred.save(stream, format="jpeg", quality=35 + int(rng.random() * 30))
    return Image.open(stream).convert("RGB")
