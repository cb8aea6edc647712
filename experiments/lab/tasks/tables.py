"""Printed tables of scikit-learn's irises, three lines of two measures: read, compare, count, the largest."""

from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data.record import Record
from experiments.lab.tasks.writing import in_split

SIDE, LINES = 96, 3
MEASURES = {"petal width": 3, "sepal width": 1}
"""Measure -> its column in scikit-learn's table."""
FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSansMono", "DejaVuSansMono-Bold")
"""Fonts that matplotlib ships."""
SIZES, HEAD_SIZE, JITTER = (12, 14, 16), 9, (6, 3)
"""Sizes of the numbers' and the heading's fonts, and how far a number may be from the middle of its cell, across and
down, in pixels."""
HEAD = 21
"""Height of the heading in pixels."""


@cache
def _flowers(split: str) -> np.ndarray:
    """Millimetres [N, 2] in the order of `MEASURES`; every fifth iris is for tests."""
    from sklearn.datasets import load_iris

    values, _ = load_iris(return_X_y=True)
    return (10 * np.asarray(values)[:, [*MEASURES.values()]]).round().astype(int)[in_split(len(values), split)]


@cache
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"), size)


def _picture(rng: np.random.Generator, values: np.ndarray) -> np.ndarray:
    """A heading and a line for each flower, in one font and ink on light paper."""
    paper, ink = (tuple(rng.integers(*bounds, size=3).tolist()) for bounds in ((220, 256), (0, 90)))
    font, heading = _font(str(rng.choice(FONTS)), int(rng.choice(SIZES))), _font("DejaVuSans", HEAD_SIZE)
    image = Image.new("RGB", (SIDE, SIDE), paper)
    draw = ImageDraw.Draw(image)
    high, wide = (SIDE - HEAD) // LINES, SIDE // len(MEASURES)
    for column, measure in enumerate(MEASURES):
        middle = column * wide + wide // 2
        draw.text((middle, HEAD // 2), measure.replace(" ", "\n"), ink, heading, anchor="mm", spacing=0, align="center")
        for line, value in enumerate(values[:, column]):
            across, down = (int(rng.integers(-most, most + 1)) for most in JITTER)
            draw.text((middle + across, HEAD + line * high + high // 2 + down), str(value), ink, font, anchor="mm")
    return np.asarray(image)


def record(rng: np.random.Generator, split: str) -> Record:
    """Draws a table and a question about it.

    Args:
        rng: random numbers.
        split: "train" or "test", which have different irises.

    Returns:
        The record; its latents are the six numbers.
    """
    irises = _flowers(split)
    # Each number of another iris: a model would know the 120 flowers by some of their numbers, instead of reading all.
    values = irises[rng.integers(len(irises), size=(LINES, len(MEASURES))), np.arange(len(MEASURES))]
    column, name = [*enumerate(MEASURES)][rng.integers(len(MEASURES))]
    shown = values[:, column]
    one, other = rng.choice(LINES, size=2, replace=False)
    kinds = ["read", "compare", "count"]
    if (shown == shown.max()).sum() == 1:
        kinds.append("largest")
    kind = str(rng.choice(kinds))
    if kind == "read":
        question, answer = f"what is the {name} in line {one + 1}?", str(shown[one])
    elif kind == "compare":
        question = f"is the {name} in line {one + 1} larger than in line {other + 1}?"
        answer = "yes" if shown[one] > shown[other] else "no"
    elif kind == "count":
        bound = rng.choice(irises[:, column])
        question, answer = f"how many lines have a {name} above {bound}?", str((shown > bound).sum())
    else:
        question, answer = f"which line has the largest {name}?", str(shown.argmax() + 1)
    facts = {
        f"{measure.replace(' ', '_')}_{line + 1}": int(values[line, at])
        for at, measure in enumerate(MEASURES)
        for line in range(LINES)
    }
    return Record(images=(_picture(rng, values),), question=question, answer=answer, type=kind, latents=facts)
