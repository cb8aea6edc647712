"""Contact sheets of advertisements with their texts, questions and answers."""

import textwrap

from PIL import Image, ImageDraw

from data.maad import sprites
from data.maad.drawing import source

_WIDTH, _GAP, _LINE, _COLUMNS = 232, 12, 13, 6


def contact_sheet(tier: str, split: str = "test", count: int = 24, *, first: int = 0, seed: int = 0) -> Image.Image:
    """Draws records of MAAD-synth on a sheet, six per row, each about 224 pixels wide.

    Args:
        tier: `s`, `m` or `full`.
        split: name of the split.
        count: number of records; question types repeat after 12.
        first: number of the first record.
        seed: seed of the data set.

    Returns:
        An RGB image.
    """
    records = source(tier, split, first + count, seed=seed)
    cells = [_cell(records[row]) for row in range(first, first + count)]
    high = max(cell.height for cell in cells)
    rows = -(-count // _COLUMNS)
    sheet = Image.new("RGB", (_COLUMNS * (_WIDTH + _GAP) + _GAP, rows * (high + _GAP) + _GAP), "white")
    for place, cell in enumerate(cells):
        left, top = place % _COLUMNS * (_WIDTH + _GAP), place // _COLUMNS * (high + _GAP)
        sheet.paste(cell, (left + _GAP, top + _GAP))
    return sheet


def _cell(record) -> Image.Image:
    scale = max(1, 224 // record.images[0].shape[1])
    side = record.images[0].shape[1] * scale
    lines = [(line, (110, 110, 118)) for line in textwrap.wrap(record.text, 36)]
    lines += [(line, (20, 60, 140)) for line in textwrap.wrap(record.question, 36)]
    lines += [(line, (0, 105, 50)) for line in textwrap.wrap(record.answer, 36)]
    cell = Image.new("RGB", (_WIDTH, side + 6 + _LINE * len(lines)), "white")
    cell.paste(
        Image.fromarray(record.images[0]).resize((side, side), Image.Resampling.NEAREST), ((_WIDTH - side) // 2, 0)
    )
    pen, font = ImageDraw.Draw(cell), sprites.face("inconsolata", 12)
    for place, (line, ink) in enumerate(lines):
        pen.text((4, side + 5 + place * _LINE), line, font=font, fill=ink)
    return cell
