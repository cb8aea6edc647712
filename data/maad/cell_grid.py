"""What every small cell of a picture shows: dense targets for pretraining an image encoder.

Facts of a whole picture teach a small encoder to read words and digits too slowly: it must first find them. Told which
fact each cell shows and with what value, it learns where to look and what to read at once.
"""

from collections.abc import Mapping

import numpy as np

from data.maad.latents import Picture
from data.maad.layouts import Box
from data.maad.tiers import Tier, brands, fact_sizes
from data.maad.vocab import SYLLABLES

SIDE = 16
"""Cells along each side of a picture."""

_BACKGROUND, _CURRENCY, _SLOGAN = range(3)
_PLAIN = 3


def cell_classes(tier: Tier) -> int:
    """How many classes a cell can have: background, currency sign, slogan, then every value of every fact.

    Args:
        tier: the preset.

    Returns:
        Number of classes.
    """
    return _PLAIN + sum(fact_sizes(tier).values())


def cells(tier: Tier, picture: Picture, facts: Mapping[str, int], boxes: Mapping[str, Box]) -> np.ndarray:
    """The class of what stands at the middle of each cell.

    The characters of a price share its width evenly, and so do the letters of a brand's two syllables, which is where
    they stand to within a pixel or two. A logo shows its shape on the left and its colour on the right.

    Args:
        tier: the preset.
        picture: what is drawn.
        facts: the picture's facts, from `data.maad.drawing.facts`.
        boxes: where each drawn element stands, from `data.maad.render.compose`.

    Returns:
        uint8 [SIDE, SIDE], rows from the top.
    """
    sizes = fact_sizes(tier)
    first = dict(zip(sizes, _PLAIN + np.cumsum([0, *sizes.values()])[:-1], strict=True))
    shows = {name: first[name] + value for name, value in facts.items()}
    found, middle = np.zeros((SIDE, SIDE), np.uint8), (np.arange(SIDE) + 0.5) * tier.px / SIDE
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
        found[top:bottom, left:right] = np.array(classes, np.uint8)[places.astype(int)]
    return found
