"""Drawing of advertisements from their latents, with Pillow."""

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
    """One of 64 phone numbers, few enough to cache their drawings."""
    return f"tel {2000 + noise % 64 * 123}"


def _badge(claim: int) -> str:
    """Text of the badge; without a claim, a text of typical size that reserves its space."""
    return ("SALE", *(c.badge for c in CLAIMS), *HARMLESS_BADGES)[claim]


def _parts(tier: Tier, latents: Latents, rng: random.Random) -> dict[str, Sprite]:
    """Sprites of all elements, also of those that are not drawn: they reserve their space in the layout."""
    picture, style = latents.picture, latents.style
    palette, brand = sprites.PALETTES[style.palette], brands(tier)[0][picture.brand]
    small, scale = _pick(tier.small_px, rng), max(1, tier.px // 100)
    # A multiple of four degrees, so that rotations can be cached.
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
        # Between the colours of plates and words: distinct, and dark enough on the brightest background.
        red, green, blue = ((a + b) // 2 for a, b in zip(palette.ink, palette.accent, strict=True))
        parts["brand"] = Sprite((red, green, blue), sprites.words(brand.name.lower(), style.font, side))
    price, px = f"${picture.price}", _pick(tier.price_px, rng)
    if rng.random() < tier.plates:
        parts["price"] = sprites.plate(price, style.font, px, palette.ink, _WHITE)
    else:
        parts["price"] = Sprite(palette.ink, sprites.words(price, style.font, px))
    return parts


def compose(tier: Tier, latents: Latents) -> tuple[Image.Image, dict[str, Box]]:
    """Draws an advertisement.

    Args:
        tier: the preset.
        latents: the advertisement.

    Returns:
        The image, and the box of each drawn element.
    """
    picture, style = latents.picture, latents.style
    rng = random.Random(style.noise)
    boxes, attempts = None, 0
    while boxes is None:
        # Large elements may not fit together; then draw other sizes.
        parts, attempts = _parts(tier, latents, rng), attempts + 1
        boxes = place(style.layout, {name: part.size for name, part in parts.items()}, tier.px, tier.jitter, rng)
        if attempts == 1000:
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
    """Degrades an image: slight blur and strong JPEG compression."""
    stream = io.BytesIO()
    blurred = image.filter(ImageFilter.GaussianBlur(0.3 + 0.4 * rng.random()))
    blurred.save(stream, format="jpeg", quality=35 + int(rng.random() * 30))
    return Image.open(stream).convert("RGB")
