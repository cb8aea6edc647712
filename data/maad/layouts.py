"""Layouts of advertisements: rows of columns of boxes with the free space distributed between them."""

import random
from functools import lru_cache
from typing import NamedTuple

Size = tuple[int, int]


class Box(NamedTuple):
    """A rectangle in pixels; `right` and `bottom` are exclusive."""

    left: int
    top: int
    right: int
    bottom: int


# Rows of columns of stacked elements; the second form swaps the badge and the slogan.
_FORMS = (
    ((("brand",), ("badge",)), (("icon",), ("price", "slogan")), (("qr",), ("phone", "notice"))),
    ((("brand",), ("slogan",)), (("icon",), ("price", "badge")), (("qr",), ("phone", "notice"))),
)
_ORDERS = ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))
_MARGIN, _APART, _BETWEEN = 2, 2, 4


@lru_cache
def layout(index: int) -> tuple[tuple[tuple[str, ...], ...], ...]:
    """Returns one of 96 layouts, which differ in the order of rows, the mirrored rows and the form.

    Args:
        index: 0 to 95; 16 consecutive layouts have the same order of rows.

    Returns:
        Rows, top to bottom, of columns, left to right, of element names.
    """
    order, rest = divmod(index, 16)
    form, mirrored = _FORMS[rest % 2], rest // 2
    return tuple(form[row][::-1] if mirrored >> row & 1 else form[row] for row in _ORDERS[order])


def _gaps(free: int, count: int, jitter: float, rng: random.Random) -> list[int]:
    """Offsets of `count` gaps in the free space: even ones, moved towards random ones by `jitter`."""
    cuts = sorted(rng.random() for _ in range(count))
    even = (place / (count + 1) for place in range(1, count + 1))
    return [int(free * ((1 - jitter) * a + jitter * b)) for a, b in zip(even, cuts, strict=True)]


def place(index: int, sizes: dict[str, Size], px: int, jitter: float, rng: random.Random) -> dict[str, Box] | None:
    """Places every element inside the image, at least 2 pixels from any other.

    Args:
        index: number of the layout.
        sizes: width and height of each element in pixels.
        px: side of the image.
        jitter: fraction of the free space that is distributed at random, 0 to 1.
        rng: random generator.

    Returns:
        element name -> box; None if the elements do not fit.
    """
    rows = layout(index)
    heights = [max(sum(sizes[n][1] + _APART for n in column) - _APART for column in row) for row in rows]
    free = px - 2 * _MARGIN - sum(heights) - _APART * (len(rows) - 1)
    boxes: dict[str, Box] = {}
    top = _MARGIN
    if free < 0:
        return None
    for row, height, gap in zip(rows, heights, _gaps(free, len(rows), jitter, rng), strict=True):
        widths = [max(sizes[n][0] for n in column) for column in row]
        spare = px - 2 * _MARGIN - sum(widths) - _BETWEEN * (len(row) - 1)
        if spare < 0:
            return None
        left = _MARGIN
        for column, width, shift in zip(row, widths, _gaps(spare, len(row), jitter, rng), strict=True):
            slack = height - sum(sizes[n][1] + _APART for n in column) + _APART
            y = top + gap
            for name, drop in zip(column, _gaps(slack, len(column), jitter, rng), strict=True):
                wide, high = sizes[name]
                x = left + shift + _gaps(width - wide, 1, jitter, rng)[0]
                boxes[name] = Box(x, y + drop, x + wide, y + drop + high)
                y += high + _APART
            left += width + _BETWEEN
        top += height + _APART
    return boxes
