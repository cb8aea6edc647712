"""Bar charts of measurements in scikit-learn's tables (wines, tumours): heights, order, the highest bar."""

from functools import cache

import numpy as np
from PIL import Image, ImageDraw

from data.record import Record
from experiments.lab.tasks.writing import in_split

SIDE, BARS, LEVELS = 112, 5, 10
COLOURS = {
    "red": (200, 40, 40),
    "green": (40, 150, 60),
    "blue": (40, 70, 200),
    "yellow": (230, 190, 30),
    "black": (0, 0, 0),
}
STEP, GROUND = 10, 106
"""Pixels of a level, and the row of the axis."""


@cache
def _levels(split: str) -> list[np.ndarray]:
    """Levels [N, features] of 0 to `LEVELS` by table; every fifth row is for tests."""
    from sklearn.datasets import load_breast_cancer, load_wine

    tables = []
    for load in (load_wine, load_breast_cancer):
        values, _ = load(return_X_y=True)
        # By rank: measurements with a few large values would all be low bars.
        ranks = values.argsort(axis=0).argsort(axis=0) / (len(values) - 1)
        tables.append((LEVELS * ranks).round().astype(int)[in_split(len(values), split)])
    return tables


def _picture(levels: np.ndarray, colours: list[str]) -> np.ndarray:
    image = Image.new("RGB", (SIDE, SIDE), "white")
    draw = ImageDraw.Draw(image)
    for level in range(LEVELS + 1):
        height = GROUND - STEP * level
        draw.line([(0, height), (SIDE, height)], fill=(150, 150, 150) if level % 5 == 0 else (225, 225, 225))
    wide = SIDE // BARS
    for place, (level, colour) in enumerate(zip(levels, colours, strict=True)):
        # A bar of height zero is still seen.
        corners = [(place * wide + 4, GROUND - STEP * level - 1), (place * wide + wide - 2, GROUND + 2)]
        draw.rectangle(corners, fill=COLOURS[colour])
    return np.asarray(image)


def record(rng: np.random.Generator, split: str) -> Record:
    """Draws a chart and a question about it.

    Args:
        rng: random numbers.
        split: "train" or "test", which have different wines and tumours.

    Returns:
        The record; its latents are the height and the place of every colour.
    """
    tables = _levels(split)
    table = tables[rng.integers(len(tables))]
    levels = table[rng.integers(len(table)), rng.choice(table.shape[1], size=BARS, replace=False)]
    colours = [str(name) for name in rng.permutation([*COLOURS])]
    height = dict(zip(colours, levels.tolist(), strict=True))
    one, other = rng.choice(colours, size=2, replace=False)
    kinds = ["height", "compare", "above"]
    if (levels == levels.max()).sum() == 1:
        kinds.append("highest")
    kind = rng.choice(kinds)
    if kind == "height":
        question, answer = f"how high is the {one} bar?", str(height[one])
    elif kind == "compare":
        question = f"is the {one} bar higher than the {other} one?"
        answer = "yes" if height[one] > height[other] else "no"
    elif kind == "above":
        question = f"how many bars are higher than the {one} one?"
        answer = str(sum(each > height[one] for each in height.values()))
    else:
        question, answer = "which bar is the highest?", max(colours, key=lambda colour: height[colour])
    facts = {f"{colour}_height": height[colour] for colour in COLOURS}
    facts |= {f"{colour}_place": colours.index(colour) for colour in COLOURS}
    return Record(images=(_picture(levels, colours),), question=question, answer=answer, type=str(kind), latents=facts)
