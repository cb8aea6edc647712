"""Printed tables of scikit-learn's irises in millimetres: read, compare, count, the largest."""

from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data.record import Record
from experiments.lab.tasks.writing import in_split

SIDE, FLOWERS = 96, 3
MEASURES = ("sepal length", "sepal width", "petal length", "petal width")
FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSansMono", "DejaVuSansMono-Bold")
"""Fonts that matplotlib ships."""
SIZES, LABEL_SIZE, JITTER = (11, 12, 13), 9, 2
"""Sizes of the numbers' and the labels' fonts, and how far a number may be from the middle of its cell, in pixels."""
LABELS = 36
"""Width of the column of labels in pixels."""


@cache
def _flowers(split: str) -> np.ndarray:
    """Millimetres [N, 4] in the order of `MEASURES`; every fifth iris is for tests."""
    from sklearn.datasets import load_iris

    values, _ = load_iris(return_X_y=True)
    return (10 * values).round().astype(int)[in_split(len(values), split)]


@cache
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"), size)


def _picture(rng: np.random.Generator, values: np.ndarray, order: np.ndarray) -> np.ndarray:
    """A row for each measure, in an order, and a column for each flower, in one font and ink on light paper."""
    paper, ink = (tuple(rng.integers(*bounds, size=3).tolist()) for bounds in ((220, 256), (0, 90)))
    font, labels = _font(str(rng.choice(FONTS)), int(rng.choice(SIZES))), _font("DejaVuSans", LABEL_SIZE)
    image = Image.new("RGB", (SIDE, SIDE), paper)
    draw = ImageDraw.Draw(image)
    high, wide = SIDE // len(MEASURES), (SIDE - LABELS) // FLOWERS
    for row, measure in enumerate(order):
        middle = row * high + high // 2
        draw.text((2, middle), MEASURES[measure].replace(" ", "\n"), ink, labels, anchor="lm", spacing=0)
        for column in range(FLOWERS):
            across, down = rng.integers(-JITTER, JITTER + 1, size=2)
            place = LABELS + column * wide + wide // 2 + across, middle + down
            draw.text(place, str(values[column, measure]), ink, font, anchor="mm")
    return np.asarray(image)


def record(rng: np.random.Generator, split: str) -> Record:
    """Draws a table of three irises and a question about it.

    Args:
        rng: random numbers.
        split: "train" or "test", which have different irises.

    Returns:
        The record; its latents are the measure of every row, and the two digits of every cell.
    """
    irises = _flowers(split)
    values = irises[rng.integers(len(irises), size=FLOWERS)]
    order = rng.permutation(len(MEASURES))
    measure = int(rng.integers(len(MEASURES)))
    name, shown = MEASURES[measure], values[:, measure]
    one, other = rng.choice(FLOWERS, size=2, replace=False)
    kinds = ["read", "compare", "count"]
    if (shown == shown.max()).sum() == 1:
        kinds.append("largest")
    kind = rng.choice(kinds)
    if kind == "read":
        question, answer = f"what is the {name} of flower {one + 1}?", str(shown[one])
    elif kind == "compare":
        question = f"is the {name} of flower {one + 1} larger than that of flower {other + 1}?"
        answer = "yes" if shown[one] > shown[other] else "no"
    elif kind == "count":
        bound = rng.integers(irises[:, measure].min(), irises[:, measure].max())
        question, answer = f"how many flowers have a {name} above {bound}?", str((shown > bound).sum())
    else:
        question, answer = f"which flower has the largest {name}?", str(shown.argmax() + 1)
    facts = {f"row_{row + 1}": int(of) for row, of in enumerate(order)}
    for row, of in enumerate(order):
        for flower in range(FLOWERS):
            tens, ones = divmod(int(values[flower, of]), 10)
            facts |= {f"row_{row + 1}_tens_{flower + 1}": tens, f"row_{row + 1}_ones_{flower + 1}": ones}
    return Record(
        images=(_picture(rng, values, order),), question=question, answer=answer, type=str(kind), latents=facts
    )
