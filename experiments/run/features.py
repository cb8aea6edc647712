"""Image features that are computed once, for whatever leaves the image side as it is."""

import json
import shutil
from collections.abc import Sequence
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from antgmm_jax.axes import to_dict
from antgmm_jax.config import LMMConfig
from antgmm_jax.families import family
from antgmm_jax.io import folders
from antgmm_jax.io.shards import Shards, Writer
from antgmm_jax.parallel.processes import by_first, from_first, gather
from antgmm_jax.parallel.sharding import rows
from antgmm_jax.pure import Params, functional
from data.shifting import drawn
from distill import fingerprint
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


class StoredViews:
    """Image features on disk, a record for each row: `data.making.Views`.

    Args:
        directory: from `image_features`.
        samples: rows.

    Attributes:
        count: views of each row.
    """

    def __init__(self, directory: Path, samples: int):
        about = json.loads((directory / "meta.json").read_text())
        self.count, self._shape, self._dtype = about["views"], about["shape"], np.dtype(about["dtype"])
        self._rows = Shards(directory, samples)

    def __getitem__(self, index: int) -> Float[np.ndarray, "V M N D"]:
        """The features of all views of a row's pictures."""
        return np.frombuffer(self._rows[index], self._dtype).reshape(self.count, -1, *self._shape)


class ImageFeatures:
    """`image_features` of some samples, kept on disk for as long as the image side stays what it is.

    Args:
        samples: encoded records.
        seed: of the moves.
        folder: where they are kept, of this run alone; all its processes see it.
    """

    def __init__(self, samples: Samples, seed: int, folder: Path):
        self._samples, self._seed, self._folder = samples, seed, folder
        self._key, self._made = "", None

    def __call__(self, config: LMMConfig, params: Params, shift: int = 0) -> StoredViews:
        """The features of a model, computed where those kept are another's.

        Args:
            config: the model.
            params: its parameters.
            shift: as in `image_features`.
        """
        paths = [path.split("/") for path in family(config).features]
        own = [reduce(getitem, path, params) for path in paths]
        # A config lies as the parameters do; another language model has the same features.
        parts = {path[0]: to_dict(getattr(config, path[0])) for path in paths}
        about = f"{json.dumps(parts)} {shift} {self._seed} {self._samples.fingerprint}"
        key = fingerprint(own, about)[:16]
        if self._made is None or key != self._key:
            place = self._folder / key
            self.drop(but=place)  # before as much again is made
            if not by_all(place.exists()):
                image_features(config, params, self._samples, place, shift=shift, seed=self._seed)
            self._key, self._made = key, StoredViews(place, len(self._samples))
        return self._made

    def drop(self, but: Path | None = None) -> None:
        """Removes what is kept: for what trains the image side. `but`: a folder that stays."""
        self._key, self._made = "", None

        def remove() -> None:
            for path in self._folder.iterdir() if self._folder.exists() else ():
                if path != but:
                    shutil.rmtree(path)

        by_first(remove)


def by_all(held: bool) -> bool:
    """Whether something holds for the first process, and so for all."""
    return bool(from_first(np.array(held)))


def image_features(
    config: LMMConfig,
    params: Params,
    samples: Samples,
    directory: Path,
    *,
    shift: int = 0,
    seed: int = 0,
    batch_size: int = 64,
) -> StoredViews:
    """What the image side hands to its last linear map, once for every row: for what does not train it.

    Args:
        config: the model.
        params: its parameters.
        samples: encoded records.
        directory: where they are written, complete or not at all; all processes see it.
        shift: pixels by which pictures are moved at random, at most, each way; above 0 each row has `VIEWS` views.
        seed: of the moves.
        batch_size: rows at a time.

    Returns:
        Features in float32.
    """
    run, rng, count = jax.jit(functional(config).features), np.random.default_rng(seed), views(shift)
    moves = np.stack([drawn(rng, shift, (len(samples),)).astype(np.int16) for _ in range(count)])
    partial, done = directory.with_name(f".{directory.name}.tmp"), 0
    writer = by_first(lambda: _begin(partial))
    with bar("image features", len(samples)) as update:
        for seen in samples.pictures(min(batch_size, len(samples)), moves):
            made = np.stack([gather(run(params, rows(images))) for images in seen], axis=1)
            made = made[: len(samples) - done]
            if writer is not None:
                for row, features in enumerate(made, done):
                    writer.add(row, features[:, : samples.needs.slots[row]].tobytes())
            done += len(made)
            update(done, "")
    about = {"views": count, "shape": made.shape[3:], "dtype": str(made.dtype)}
    by_first(lambda: _finish(writer, partial, directory, about))
    return StoredViews(directory, len(samples))


def _begin(partial: Path) -> Writer:
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return Writer(partial, 0)


def _finish(writer: Writer | None, partial: Path, directory: Path, about: dict[str, Any]) -> None:
    assert writer is not None  # this is the first process
    writer.flush()
    (partial / "meta.json").write_text(json.dumps(about))
    folders.publish(partial, directory)
