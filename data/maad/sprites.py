"""Parts of advertisements, with caching: icons, logos, words, QR codes and backgrounds."""

import math
import random
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from data.maad.vocab import COLOURS, PRODUCTS, SHAPES

_ASSETS = Path(__file__).parent / "assets"
_CELL, _COLUMNS, _CODES, _MODULES = 96, 12, 24, 21
RGB = tuple[int, int, int]


class Sprite(NamedTuple):
    """An image or a single colour, and its mask."""

    ink: Image.Image | RGB
    mask: Image.Image

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.mask.size


class Palette(NamedTuple):
    """Colours of an advertisement: background from top to bottom, words, plates."""

    top: RGB
    bottom: RGB
    ink: RGB
    accent: RGB


PALETTES = (
    Palette((255, 250, 240), (250, 225, 190), (60, 30, 10), (200, 70, 30)),
    Palette((240, 248, 255), (190, 220, 245), (10, 30, 70), (20, 90, 170)),
    Palette((244, 255, 240), (205, 235, 195), (20, 55, 20), (40, 125, 50)),
    Palette((255, 242, 248), (245, 205, 225), (80, 15, 50), (185, 35, 105)),
    Palette((252, 252, 252), (222, 222, 226), (25, 25, 30), (70, 70, 85)),
    Palette((250, 244, 255), (222, 205, 242), (45, 20, 80), (110, 60, 170)),
    Palette((255, 253, 225), (250, 235, 150), (70, 50, 0), (160, 95, 0)),
    Palette((235, 255, 253), (185, 232, 228), (0, 55, 55), (0, 110, 110)),
)


@lru_cache
def _image(name: str, mode: str) -> Image.Image:
    with Image.open(_ASSETS / name) as file:
        return file.convert(mode)


@lru_cache(maxsize=8192)
def icon(product: str, style: str, px: int, degrees: int) -> Sprite:
    """Returns the drawing of a product.

    Args:
        product: its name.
        style: `noto` or `fluent`.
        px: side in pixels.
        degrees: rotation, counterclockwise.

    Returns:
        A square sprite.
    """
    at = next(i for i, p in enumerate(PRODUCTS) if p.name == product)
    left, top = at % _COLUMNS * _CELL, at // _COLUMNS * _CELL
    cell = _image(f"icons-{style}.png", "RGBA").crop((left, top, left + _CELL, top + _CELL))
    if degrees:
        # Shrink first, so that the corners stay inside the cell after the rotation.
        turn = abs(math.radians(degrees))
        inner = int(_CELL / (math.cos(turn) + math.sin(turn)))
        small = cell.resize((inner, inner), Image.Resampling.LANCZOS)
        cell = Image.new("RGBA", (_CELL, _CELL))
        cell.paste(small, ((_CELL - inner) // 2, (_CELL - inner) // 2))
        cell = cell.rotate(degrees, Image.Resampling.BICUBIC)
    cell = cell.resize((px, px), Image.Resampling.LANCZOS)
    return Sprite(cell.convert("RGB"), cell.getchannel("A"))


@lru_cache
def logo(shape: int, colour: int, px: int) -> Sprite:
    """Draws a coloured shape on a white plate, antialiased by drawing it four times larger."""
    big = 4 * px
    plate = Image.new("RGB", (big, big), "white")
    pen, fill = ImageDraw.Draw(plate), tuple(COLOURS.values())[colour]
    lo, hi, mid = 0.14 * big, 0.86 * big, big / 2
    match SHAPES[shape]:
        case "circle":
            pen.ellipse((lo, lo, hi, hi), fill=fill)
        case "square":
            pen.rectangle((lo, lo, hi, hi), fill=fill)
        case "triangle":
            pen.polygon(((mid, lo), (hi, hi), (lo, hi)), fill=fill)
        case "plus":
            pen.rectangle((lo, 0.38 * big, hi, 0.62 * big), fill=fill)
            pen.rectangle((0.38 * big, lo, 0.62 * big, hi), fill=fill)
        case _:
            radii = (0.44 * big, 0.18 * big)
            turns = [(math.pi * (k / 5 - 0.5), radii[k % 2]) for k in range(10)]
            pen.polygon([(mid + r * math.cos(t), mid + r * math.sin(t)) for t, r in turns], fill=fill)
    mask = Image.new("L", (big, big))
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, big - 1, big - 1), big // 6, fill=255)
    return Sprite(plate.resize((px, px), Image.Resampling.BOX), mask.resize((px, px), Image.Resampling.BOX))


@lru_cache
def face(name: str, px: int) -> ImageFont.FreeTypeFont:
    """Loads a font of the assets at a size in pixels."""
    return ImageFont.truetype(str(_ASSETS / f"{name}.ttf"), px, layout_engine=ImageFont.Layout.BASIC)


@lru_cache(maxsize=65536)
def words(text: str, font: str, px: int) -> Image.Image:
    """Draws a line of text as a mask, cropped to its ink.

    Args:
        text: printable ASCII.
        font: name of a font of the assets.
        px: size of the em square in pixels.

    Returns:
        An `L` image.
    """
    drawn = face(font, px)
    left, top, right, bottom = drawn.getbbox(text)
    mask = Image.new("L", (int(right - left), int(bottom - top)))
    ImageDraw.Draw(mask).text((-left, -top), text, font=drawn, fill=255)
    return mask


@lru_cache(maxsize=65536)
def plate(text: str, font: str, px: int, ground: RGB, ink: RGB) -> Sprite:
    """Draws a line of text on a rounded plate with a margin of three pixels."""
    mask = words(text, font, px)
    size = (mask.width + 6, mask.height + 6)
    image, cover = Image.new("RGB", size, ground), Image.new("L", size)
    image.paste(ink, (3, 3), mask)
    ImageDraw.Draw(cover).rounded_rectangle((0, 0, size[0] - 1, size[1] - 1), 3, fill=255)
    return Sprite(image, cover)


@lru_cache
def code(which: int, scale: int) -> Sprite:
    """Returns one of the 24 QR codes with a white margin of two modules."""
    left = which % _CODES * _MODULES
    bare = _image("qr.png", "L").crop((left, 0, left + _MODULES, _MODULES))
    side = _MODULES * scale
    image = Image.new("RGB", (side + 4 * scale, side + 4 * scale), "white")
    image.paste(bare.resize((side, side), Image.Resampling.NEAREST), (2 * scale, 2 * scale))
    return Sprite(image, Image.new("L", image.size, 255))


@lru_cache
def ground(palette: int, px: int) -> Image.Image:
    """Draws the background: a gradient from top to bottom."""
    top, bottom = PALETTES[palette].top, PALETTES[palette].bottom
    column = Image.new("RGB", (1, px))
    for y in range(px):
        column.putpixel((0, y), tuple(a + (b - a) * y // px for a, b in zip(top, bottom, strict=True)))
    return column.resize((px, px), Image.Resampling.NEAREST)


def clutter(image: Image.Image, palette: int, count: int, rng: random.Random) -> None:
    """Draws pale shapes and lines onto a background, in place."""
    pen, px = ImageDraw.Draw(image), image.width
    low, high = PALETTES[palette].bottom, PALETTES[palette].accent
    for _ in range(count):
        x, y, reach = rng.random() * px, rng.random() * px, (0.04 + 0.25 * rng.random()) * px
        strength = 0.08 + 0.27 * rng.random()
        fill = tuple(int(a + (b - a) * strength) for a, b in zip(low, high, strict=True))
        box = (x - reach, y - reach, x + reach, y + reach * rng.random())
        match int(rng.random() * 4):
            case 0:
                pen.ellipse(box, fill=fill)
            case 1:
                pen.rectangle(box, fill=fill)
            case 2:
                pen.line(((x, y), (rng.random() * px, rng.random() * px)), fill=fill, width=1 + int(rng.random() * 3))
            case _:
                pen.arc(box, 0, 360, fill=fill, width=2)
