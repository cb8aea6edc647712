"""Class of the content of every cell of an image: dense targets for pretraining an image encoder.

From facts of the whole image alone, a small encoder learns to read words and digits too slowly, because it must locate
them first. Targets per cell teach location and content at once.
"""

from collections.abc import Mapping

import numpy as np

from data.maad.latents import Picture
from data.maad.layouts import Box
from data.maad.tiers import Tier, brands, fact_sizes
from data.maad.vocab import SYLLABLES

SIDE = 16
"""Cells along each side of an image."""

_BACKGROUND, _CURRENCY, _SLOGAN = range(3)
_PLAIN = 3


def cell_classes(tier: Tier) -> int:
    """Returns the number of classes of a cell: background, currency sign, slogan, and every value of every fact.

    Args:
        tier: the preset.

    Returns:
        Number of classes.
    """
    return _PLAIN + sum(fact_sizes(tier).values())


def cells(tier: Tier, picture: Picture, facts: Mapping[str, int], boxes: Mapping[str, Box]) -> np.ndarray:
    """Returns the class at the centre of each cell.

    Characters of a price and letters of a brand are assumed to be equally wide, which is correct within a pixel or two.
    For a logo, the left half has the class of its shape and the right half that of its colour.

    Args:
        tier: the preset.
        picture: latents of the image.
        facts: facts of the image, from `data.maad.drawing.facts`.
        boxes: boxes of the drawn elements, from `data.maad.render.compose`.

    Returns:
        uint8 [SIDE, SIDE], rows from the top.
    """
    sizes = fact_sizes(tier)
    first = dict(zip(sizes, _PLAIN + np.cumsum([0, *sizes.values()])[:-1], strict=True))
    shows = {name: first[name] + value for name, value in facts.items()}
    classes_by_cell, middle = np.zeros((SIDE, SIDE), np.uint8), (np.arange(SIDE) + 0.5) * tier.px / SIDE
    for element, box in boxes.items():
        top, bottom, left, right = np.searchsorted(middle, (box.top, box.bottom, box.left, box.right))
        match element:
            case "price":
                classes = [_CURRENCY, *(shows[f"price_{place}"] for place in range(len(str(picture.price))))]
            case "brand":
                one, two = brands(tier)[0][picture.brand].parts
                lengths = (len(SYLLABLES[0][one]), len(SYLLABLES[1][two])) if tier.brands == "word" else (1, 1)
                classes = [shows["brand_0"]] * lengths[0] + [shows["brand_1"]] * lengths[1]
            case "slogan":
                classes = [_SLOGAN]
            case _:
                classes = [shows[{"icon": "product", "badge": "claim"}.get(element, element)]]
        places = (middle[left:right] - box.left) / (box.right - box.left) * len(classes)
        classes_by_cell[top:bottom, left:right] = np.array(classes, np.uint8)[places.astype(int)]
    return classes_by_cell
