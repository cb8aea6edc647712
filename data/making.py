"""A batch of row numbers: rows are read, their pictures moved, or features computed before taken in their place."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from jaxtyping import Float

from data.collate import Layout, Shape, pictures, prompts, text
from data.record import Arrays
from data.shifting import drawn, shifted


class Rows(Protocol):
    """Encoded records by number, as `data.store.Encoded` reads them."""

    def __len__(self) -> int: ...
    def tokens(self, index: int) -> Arrays:
        """All of an encoded record but its pictures."""
        ...

    def images(self, index: int) -> Arrays:
        """Its pictures, leaves [M, ...]."""
        ...


class Views(Protocol):
    """Image features of rows, computed once.

    Attributes:
        count: of each row.
    """

    count: int

    def __getitem__(self, index: int) -> Float[np.ndarray, "V M N D"]:
        """The features of all views of a row's pictures."""
        ...


@dataclass(frozen=True)
class Seen:
    """How pictures are seen.

    Attributes:
        shift: pixels by which those of a row are moved at random, at most, each way.
        views: features that stand in for them, one of a row's views whenever it is seen.
        pictures: keep the pictures beside the features, for a teacher that reads them.
    """

    shift: int = 0
    views: Views | None = None
    pictures: bool = False

    def choices(self, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        """What chance decides of the rows of all processes, so that each is seen alike whoever makes it.

        Args:
            rng: the source of chance.
            shape: of the rows.

        Returns:
            Which view, [*shape], or rows and columns of a move, [*shape, 2].
        """
        if self.views is not None:
            return rng.integers(self.views.count, size=shape)
        return drawn(rng, self.shift, shape) if self.shift else np.zeros((*shape, 2), int)

    def images(self, rows: Rows, index: int, choice: np.ndarray) -> Arrays:
        """A row's pictures, as chance decides; `vision_features` [M, N, D] where features stand in for them."""
        found = {}
        if self.views is None or self.pictures:
            found = rows.images(index)
        if self.views is not None:
            return {**found, "vision_features": self.views[index][int(choice)]}
        return moved(found, choice)


ASIS = Seen()
"""Pictures as they are."""


def moved(images: Arrays, by: np.ndarray) -> Arrays:
    """A row's pictures, all moved by so many rows and columns, [2]."""
    if not np.any(by):
        return images
    pixels = images["pixels"]
    return {**images, "pixels": shifted(pixels, np.tile(by, (len(pixels), 1)))}


def batch(
    rows: Rows,
    index: np.ndarray,
    about: Layout,
    shape: Shape,
    *,
    seen: Seen = ASIS,
    choices: np.ndarray | None = None,
    prompt: int = 0,
) -> Arrays:
    """A training batch of rows, one sample each.

    Args:
        rows: encoded records.
        index: numbers of the rows, [B].
        about: how the model reads them.
        shape: columns and picture slots.
        seen: how pictures are seen.
        choices: what chance decided of each row, from `Seen.choices`.
        prompt: columns of the prompts alone, for generation, which are added under `prompt/`; 0 for none.

    Returns:
        What `data.collate.text` gives, `images`, `index` int32 [B], and `vision_features` [B, M, N, D] where
        features stand in for the pictures.
    """
    choices = np.zeros((len(index), 2), int) if choices is None else choices
    tokens = [rows.tokens(int(row)) for row in index]
    trees = [seen.images(rows, int(row), choice) for row, choice in zip(index, choices, strict=True)]
    made = {**text(tokens, about, shape), **placed([[tree] for tree in trees], shape.slots)}
    if prompt:
        made |= {f"prompt/{name}": value for name, value in prompts(tokens, about, prompt).items()}
    return {**made, "index": index.astype(np.int32)}


def placed(trees: list[list[Arrays]], slots: int) -> Arrays:
    """`images`, and `vision_features` where rows have them, of the trees of each row's samples."""
    found = pictures(trees, slots)
    features = {name: found.pop(name) for name in ("vision_features",) if name in found}
    return {"images": found, **features}
