"""Handwritten digits of scikit-learn, six in a picture: read, count, compare and add."""

from functools import cache

import numpy as np
from PIL import Image

from data.record import Record
from experiments.lab.tasks.writing import in_split

SIDE, ROWS, COLUMNS = 96, 2, 3
PLACES = ("top left", "top middle", "top right", "bottom left", "bottom middle", "bottom right")
DRAWN, TURNED = (22, 31), 15
"""Sides of a digit in pixels, and the degrees by which it is turned: 1 437 digits are few to learn from."""


@cache
def _digits(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images [N, 8, 8] of 0 to 16 and their digits [N]; every fifth is for tests."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    chosen = in_split(len(labels), split)
    return np.asarray(pixels)[chosen].reshape(-1, 8, 8), np.asarray(labels)[chosen]


def _picture(rng: np.random.Generator, digits: np.ndarray) -> np.ndarray:
    """Digits [6, 8, 8] in the cells of a grid, at random places, sizes and angles, in one ink on light paper."""
    paper, ink = rng.integers(200, 256, size=3), rng.integers(0, 100, size=3)
    shade = np.zeros((SIDE, SIDE), np.float32)
    high, wide = SIDE // ROWS, SIDE // COLUMNS
    for place, digit in enumerate(digits):
        row, column = divmod(place, COLUMNS)
        side = int(rng.integers(*DRAWN))
        top = row * high + rng.integers(0, high - side + 1)
        left = column * wide + rng.integers(0, wide - side + 1)
        drawn = Image.fromarray((digit * 15.9).astype(np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
        drawn = drawn.rotate(rng.uniform(-TURNED, TURNED), Image.Resampling.BICUBIC)
        shade[top : top + side, left : left + side] = np.asarray(drawn, np.float32) / 255
    return (paper + shade[..., None] * (ink - paper)).round().astype(np.uint8)


def record(rng: np.random.Generator, split: str) -> Record:
    """Draws a picture and a question about it.

    Args:
        rng: random numbers.
        split: "train" or "test", which have different digits.

    Returns:
        The record; its latents are the six digits.
    """
    images, labels = _digits(split)
    # Few different digits in half of the pictures, so that there is something to count.
    kinds = rng.choice(10, size=rng.choice([2, 10]), replace=False)
    chosen = rng.choice(np.flatnonzero(np.isin(labels, kinds)), size=len(PLACES))
    shown = labels[chosen]
    one, other = rng.choice(len(PLACES), size=2, replace=False)
    kind = rng.choice(["read", "count", "compare", "sum"])
    if kind == "read":
        question, answer = f"which digit is {PLACES[one]}?", str(shown[one])
    elif kind == "count":
        digit = rng.choice(shown) if rng.random() < 0.8 else rng.integers(10)
        question, answer = f"how often is {digit} shown?", str((shown == digit).sum())
    elif kind == "compare":
        question = f"is the digit {PLACES[one]} larger than the one {PLACES[other]}?"
        answer = "yes" if shown[one] > shown[other] else "no"
    else:
        question = f"what is the sum of the digits {PLACES[one]} and {PLACES[other]}?"
        answer = str(shown[one] + shown[other])
    facts = {place.replace(" ", "_"): int(digit) for place, digit in zip(PLACES, shown, strict=True)}
    return Record(images=(_picture(rng, images[chosen]),), question=question, answer=answer, type=kind, latents=facts)
