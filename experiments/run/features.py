"""Image features that are computed once, for whatever leaves the image side as it is."""

from collections.abc import Sequence
from functools import reduce
from operator import getitem
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from antgmm_jax.config import LMMConfig
from antgmm_jax.families import family
from antgmm_jax.functional import Params, functional
from antgmm_jax.processes import gather
from antgmm_jax.sharding import rows
from data.shifting import drawn
from experiments.run.host.console import bar
from experiments.run.samples import Samples

VIEWS = 4
"""Moved views of each picture whose features are computed where that happens once."""


def views(shift: int) -> int:
    """How many views of each picture features are computed of.

    Args:
        shift: pixels by which pictures are moved at random, at most, each way.
    """
    return VIEWS if shift else 1


def freezes_features(config: LMMConfig, frozen: Sequence[str]) -> bool:
    """Whether a phase or stage leaves all that image features depend on as it is, so that they can be computed once.

    Args:
        config: the model.
        frozen: path prefixes of what it does not train.

    Returns:
        Whether they are constant.
    """
    return all(any(f"{part}/".startswith(f"{prefix}/") for prefix in frozen) for part in family(config).features)


class ImageFeatures:
    """`image_features` of some samples, kept for as long as the image side stays what it is.

    Args:
        samples: encoded records.
        seed: of the moves.
    """

    def __init__(self, samples: Samples, seed: int):
        self._samples, self._seed = samples, seed
        self._made: tuple[Any, ...] = ()

    def __call__(self, config: LMMConfig, params: Params, shift: int = 0) -> Float[np.ndarray, "N V Q D"]:
        """The features of a model, computed where those kept are another's.

        Args:
            config: the model.
            params: its parameters.
            shift: as in `image_features`.
        """
        of = (shift, [gather(reduce(getitem, path.split("/"), params)) for path in family(config).features])
        if not (self._made and jax.tree.all(jax.tree.map(np.array_equal, self._made[0], of))):
            self.drop()  # before as much again is made
            self._made = of, image_features(config, params, self._samples, shift=shift, seed=self._seed)
        return self._made[1]

    def drop(self) -> None:
        """Frees what is kept: for what trains the image side."""
        self._made = ()


def image_features(
    config: LMMConfig, params: Params, samples: Samples, *, shift: int = 0, seed: int = 0, batch_size: int = 64
) -> Float[np.ndarray, "N V Q D"]:
    """What the image side hands to its last linear map, once for every row: for what does not train it.

    Args:
        config: the model.
        params: its parameters.
        samples: encoded records.
        shift: pixels by which pictures are moved at random, at most, each way; above 0 each has `VIEWS` views.
        seed: of the moves.
        batch_size: rows at a time.

    Returns:
        Features in float32.
    """
    run, rng = jax.jit(functional(config).features), np.random.default_rng(seed)
    found: np.ndarray | None = None
    with bar("image features", views(shift) * len(samples)) as update:
        for view in range(views(shift)):
            moves, done = drawn(rng, shift, (len(samples),)), 0
            for images in samples.pixels(min(batch_size, len(samples)), moves):
                made = gather(run(params, rows(images)))[:, 0][: len(samples) - done]
                if found is None:  # once, for of a large model they fill much of the memory
                    found = np.empty((len(samples), views(shift), *made.shape[1:]), made.dtype)
                found[done : done + len(made), view] = made
                done += len(made)
                update(view * len(samples) + done, "")
    assert found is not None  # there is a sample
    return found
