"""Creation of training batches: reads rows, and shifts their images or replaces them by cached features."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
from jaxtyping import Float

from data.collate import Layout, Shape, pictures, prompts, text
from data.record import Arrays
from data.shifting import drawn, shifted, shifted_squares

Result = TypeVar("Result")


@runtime_checkable
class Rows(Protocol):
    """Random access to encoded records, such as `data.store.Encoded`."""

    def __len__(self) -> int: ...
    def tokens(self, index: int) -> Arrays:
        """Returns an encoded record without its images."""
        ...

    def images(self, index: int) -> Arrays:
        """Returns the images of a record, leaves [M, ...]."""
        ...


@runtime_checkable
class Views(Protocol):
    """Cached image features of rows, for several views (shifted copies) of the images.

    Attributes:
        count: views per row.
    """

    count: int

    def __getitem__(self, place: tuple[int, int]) -> Float[np.ndarray, "M N D"]:
        """Returns the features of a row, by its number, in one of the views."""
        ...


@dataclass(frozen=True)
class ImageOptions:
    """Image options of a batch.

    Attributes:
        shift: maximum random shift of images in pixels, in each direction.
        views: cached features to use instead of images; each visit of a row uses a random view.
        pictures: also include the images, for a teacher that reads them.
    """

    shift: int = 0
    views: Views | None = None
    pictures: bool = False

    def choices(self, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        """Draws the random choices for the rows of all processes, so that they do not depend on the process.

        Args:
            rng: random generator.
            shape: shape of the array of rows.

        Returns:
            Number of the view, [*shape], or vertical and horizontal shift, [*shape, 2].
        """
        if self.views is not None:
            return rng.integers(self.views.count, size=shape)
        return drawn(rng, self.shift, shape) if self.shift else np.zeros((*shape, 2), int)

    def images(self, rows: Rows, index: int, tokens: Arrays, choice: np.ndarray) -> Arrays:
        """Returns the images of a row for a random choice, or `vision_features` [M, N, D] if there are cached views.

        Args:
            rows: encoded rows.
            index: row number.
            tokens: `rows.tokens(index)`.
            choice: from `choices`.

        Returns:
            Leaves [M, ...].
        """
        images = {"place": tokens["place"]} if "place" in tokens else {}
        if self.views is None or self.pictures:
            images = rows.images(index)
        if self.views is not None:
            return {**images, "vision_features": self.views[index, int(choice)]}
        return moved(images, choice)


UNCHANGED = ImageOptions()
"""Images without changes."""


def moved(images: Arrays, by: np.ndarray) -> Arrays:
    """Shifts all images of a row by the given rows and columns, [2]."""
    if not np.any(by):
        return images
    if "place" in images:
        return {**images, "pixels": shifted_squares(images["pixels"], images["place"], by)}
    pixels = images["pixels"]
    return {**images, "pixels": shifted(pixels, np.tile(by, (len(pixels), 1)))}


def batch(
    rows: Rows,
    index: np.ndarray,
    layout: Layout,
    shape: Shape,
    *,
    seen: ImageOptions = UNCHANGED,
    choices: np.ndarray | None = None,
    prompt: int = 0,
    threads: int = 1,
) -> Arrays:
    """Creates a training batch with one sample per row.

    Args:
        rows: encoded records.
        index: row numbers [B].
        layout: token layout of the model.
        shape: shape of the batch.
        seen: image options.
        choices: random choices of the rows, from `ImageOptions.choices`.
        prompt: columns of prompts for generation, which are added under `prompt/`; 0 for none.
        threads: number of threads that read the images.

    Returns:
        The arrays of `data.collate.text`, `images`, `index` int32 [B], and `vision_features` [B, M, N, D] if there are
        cached views.
    """
    choices = np.zeros((len(index), 2), int) if choices is None else choices
    tokens = [rows.tokens(int(row)) for row in index]
    trees = in_threads(partial(seen.images, rows), threads, index.tolist(), tokens, choices)
    out = {**text(tokens, layout, shape), **placed([[tree] for tree in trees], shape.slots)}
    if prompt:
        out |= {f"prompt/{name}": value for name, value in prompts(tokens, layout, prompt).items()}
    return {**out, "index": index.astype(np.int32)}


def in_threads(read: Callable[..., Result], threads: int, *arguments: Iterable[Any]) -> list[Result]:
    """Applies a function to rows, in order; decoding a picture leaves other threads running.

    Args:
        read: the function.
        threads: number of threads; 1 for the caller's.
        arguments: one iterable per argument of the function, as of `map`.

    Returns:
        Its results.
    """
    if threads == 1:
        return [*map(read, *arguments)]
    with ThreadPoolExecutor(threads) as pool:
        return [*pool.map(read, *arguments)]


def placed(trees: list[list[Arrays]], slots: int) -> Arrays:
    """Collates the image trees of rows to `images` and, if they have them, `vision_features`."""
    images = pictures(trees, slots)
    features = {name: images.pop(name) for name in ("vision_features",) if name in images}
    return {"images": images, **features}
