"""Parts of photographs of scikit-image and scikit-learn, four in a picture: names, numbers, what is upside down."""

from functools import cache

import numpy as np
from PIL import Image, ImageEnhance

from data.record import Record

SIDE = 96
PLACES = ("top left", "top right", "bottom left", "bottom right")
PHOTOS = {
    "astronaut": "astronaut",
    "bricks": "brick",
    "cameraman": "camera",
    "cat": "chelsea",
    "coffee": "coffee",
    "coins": "coins",
    "grass": "grass",
    "gravel": "gravel",
    "galaxies": "hubble_deep_field",
    "rocket": "rocket",
    "temple": "china.jpg",
    "flower": "flower.jpg",
}
"""Name in questions -> name in scikit-image, or file in scikit-learn."""
UPRIGHT = ("astronaut", "cameraman", "cat", "coffee", "rocket", "temple")
"""Photographs that have an upper side."""


@cache
def _photo(name: str) -> Image.Image:
    if PHOTOS[name].endswith(".jpg"):
        from sklearn.datasets import load_sample_image

        pixels = load_sample_image(PHOTOS[name])
    else:
        import skimage.data

        pixels = getattr(skimage.data, PHOTOS[name])()
    image = Image.fromarray(pixels).convert("RGB")
    image.thumbnail((256, 256))
    return image


def _part(rng: np.random.Generator, name: str, *, turned: bool) -> Image.Image:
    """A random square of a photograph, of 60 to 90 % of its shorter side, in a random brightness."""
    photo = _photo(name)
    side = round(min(photo.size) * rng.uniform(0.6, 0.9))
    left, top = (int(rng.integers(0, size - side + 1)) for size in photo.size)
    part = photo.crop((left, top, left + side, top + side)).resize((SIDE // 2, SIDE // 2), Image.Resampling.BILINEAR)
    part = ImageEnhance.Brightness(part).enhance(rng.uniform(0.8, 1.2))
    return part.rotate(180) if turned else part


def record(rng: np.random.Generator, split: str) -> Record:
    """Draws a picture and a question about it.

    Args:
        rng: random numbers.
        split: not used: both splits show parts of the same photographs.

    Returns:
        The record; its latents are the four photographs, and which of them is upside down (4 for none).
    """
    kinds = rng.choice([*PHOTOS], size=rng.choice([2, 4, 12]), replace=False)
    shown = [str(name) for name in rng.choice(kinds, size=len(PLACES))]
    able = [place for place, name in enumerate(shown) if name in UPRIGHT]
    turned = int(rng.choice(able)) if able and rng.random() < 0.6 else len(PLACES)
    picture = Image.new("RGB", (SIDE, SIDE))
    for place, name in enumerate(shown):
        row, column = divmod(place, 2)
        picture.paste(_part(rng, name, turned=place == turned), (column * SIDE // 2, row * SIDE // 2))
    one, other = rng.choice(len(PLACES), size=2, replace=False)
    kind = rng.choice(["name", "count", "same", "turned"])
    if kind == "name":
        question, answer = f"what is {PLACES[one]}?", shown[one]
    elif kind == "count":
        name = rng.choice(shown) if rng.random() < 0.8 else rng.choice([*PHOTOS])
        question, answer = f"how many parts show {name}?", str(shown.count(str(name)))
    elif kind == "same":
        question = f"do the parts {PLACES[one]} and {PLACES[other]} show the same?"
        answer = "yes" if shown[one] == shown[other] else "no"
    else:
        question, answer = "which part is upside down?", (*PLACES, "none")[turned]
    facts = {place.replace(" ", "_"): [*PHOTOS].index(name) for place, name in zip(PLACES, shown, strict=True)}
    facts["turned"] = turned
    return Record(images=(np.asarray(picture),), question=question, answer=answer, type=str(kind), latents=facts)
