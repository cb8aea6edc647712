"""Cached image features, for stages that do not change the image side."""

import json
import math
import shutil
from collections.abc import Collection, Sequence
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from antgmm_jax.axes import to_dict
from antgmm_jax.config import LMMConfig
from antgmm_jax.errors import AntgmmError
from antgmm_jax.families import family
from antgmm_jax.io import folders
from antgmm_jax.io.books import read_book, write_book
from antgmm_jax.io.placed import on_devices
from antgmm_jax.io.shards import Shards, Writer
from antgmm_jax.parallel import preemption, sharding
from antgmm_jax.parallel.processes import barrier, broadcast_from_first, from_first_process, gather, run_on_first
from antgmm_jax.parallel.sharding import shard_rows
from antgmm_jax.pure import Params, abstract, functional
from data.shifting import drawn
from distill import fingerprint
from distill.trainable import under
from experiments.run.batch_size import rows_that_fit
from experiments.run.files import nearest
from experiments.run.host.console import bar
from experiments.run.rows.samples import Samples
from experiments.run.student import Student

VIEWS = 4
"""Number of shifted views per image in the cache."""
_FORMAT = 2
"""Raise it when the records change: those of an earlier version are not read."""
FILES = 64
"""Files of a cache, about; an interrupted computation goes on after the last whole one."""


def views(shift: int) -> int:
    """Returns the number of views per image.

    Args:
        shift: maximum random shift in pixels.
    """
    return VIEWS if shift else 1


def freezes_features(config: LMMConfig, frozen: Sequence[str], adapters: Collection[str] = ()) -> bool:
    """Whether all parameters that image features depend on are frozen, and have no adapters.

    Args:
        config: model config.
        frozen: path prefixes of frozen parameters.
        adapters: path prefixes of parameters with adapters.

    Returns:
        Whether image features are constant.
    """
    parts = family(config).features
    adapted = any(under(part, prefix) or under(prefix, part) for part in parts for prefix in adapters)
    return not adapted and all(any(under(part, prefix) for prefix in frozen) for part in parts)


class StoredViews:
    """Image features on disk; implements `data.making.Views`.

    Args:
        directory: folder written by `image_features`.
        samples: number of rows.

    Attributes:
        count: views per row.
    """

    def __init__(self, directory: Path, samples: int):
        meta = read_book(directory / "meta.json", f"remove {directory} and run it again")
        self.count, self._shape, self._dtype = meta["views"], meta["shape"], np.dtype(meta["dtype"])
        self._records = Shards(directory, samples * self.count, directory)

    def __getitem__(self, place: tuple[int, int]) -> Float[np.ndarray, "M N D"]:
        """Returns the features of a row, by its number, in one of the views."""
        row, view = place
        return np.frombuffer(self._records[row * self.count + view], self._dtype).reshape(-1, *self._shape)


class ImageFeatures:
    """Cache of the image features of samples, which is valid until the image side changes.

    Args:
        samples: encoded records.
        seed: seed of the shifts.
        folder: folder of the cache; only this run may use it, and all its processes must see it.
    """

    def __init__(self, samples: Samples, seed: int, folder: Path):
        self._samples, self._seed, self._folder = samples, seed, folder
        self._key, self._made = "", None

    def __call__(self, student: Student, shift: int = 0, dtype: str = "float32") -> StoredViews:
        """Returns the features of a model; computes them unless they are cached.

        Args:
            student: the model; its parameters are loaded in `dtype` only if the features are not cached.
            shift: as in `image_features`.
            dtype: dtype of computation and of the features.
        """
        config = student.config
        paths = [path.split("/") for path in family(config).features]
        params = student.weights()
        leaves = [reduce(getitem, path, params) for path in paths]
        del params  # for the pass, they are loaded again in its dtype
        # Config and parameters are nested alike. The key does not depend on the language model.
        parts = {path[0]: to_dict(getattr(config, path[0])) for path in paths}
        about = f"{_FORMAT} {json.dumps(parts)} {shift} {dtype} {self._seed} {self._samples.fingerprint}"
        key = fingerprint(leaves, about)[:16]
        del leaves
        if self._made is None or key != self._key:
            place = self._folder / key
            self.drop(but=place)  # before using as much space again
            if not from_first_process(place.exists):
                params = student.load(dtype)
                image_features(config, params, self._samples, place, shift=shift, seed=self._seed, dtype=dtype)
            self._key, self._made = key, StoredViews(place, len(self._samples))
        return self._made

    def drop(self, but: Path | None = None, *, strict: bool = True) -> None:
        """Removes cached features, except for the folder `but`; if not `strict`, also if some cannot be removed."""
        self._key, self._made = "", None

        def remove() -> None:
            for path in self._folder.iterdir() if self._folder.exists() else ():
                if but is None or path not in (but, _partial(but)):
                    shutil.rmtree(path, ignore_errors=not strict)

        barrier("image features closed")  # NFS keeps files that another process of the machine reads
        run_on_first(remove)


def image_features(
    config: LMMConfig,
    params: Params,
    samples: Samples,
    directory: Path,
    *,
    shift: int = 0,
    seed: int = 0,
    batch_size: int = 64,
    dtype: str = "float32",
) -> StoredViews:
    """Computes the image features of all rows, see `antgmm_jax.pure.Functional.features`.

    An interrupted computation goes on with the rows that are not stored yet.

    Args:
        config: model config.
        params: model parameters.
        samples: encoded records.
        directory: folder to write (atomically), named after what the features depend on; all processes must see it.
        shift: maximum random shift in pixels, in each direction; if positive, each row has `VIEWS` views.
        seed: seed of the shifts.
        batch_size: maximum number of rows per batch.
        dtype: dtype of computation and of the features.

    Returns:
        The features.

    Raises:
        AntgmmError: the disk is too full.
        Preempted: SIGTERM was received; the rows up to here are stored.
    """
    run, rng, count = jax.jit(functional(config).features), np.random.default_rng(seed), views(shift)
    params, most = on_devices(config, params, dtype), min(batch_size, len(samples))

    def fits(*, slots: int, **_: int) -> int:
        return rows_that_fit(config, most, text=0, answer=0, slots=slots, dtype=dtype)

    moves = np.stack([drawn(rng, shift, (len(samples),)).astype(np.int16) for _ in range(count)])
    partial = _partial(directory)
    stored = run_on_first(lambda: _begin(partial, len(samples), count))
    held = broadcast_from_first(np.zeros(len(samples), bool) if stored is None else stored)
    slots = samples.needs.slots
    needed = feature_bytes(config, samples, shift, dtype) * slots[~held].sum() / max(1, slots.sum())
    run_on_first(lambda: check_space(directory, round(needed)))
    writer, unsaved = None if stored is None else Writer(partial, 0), 0
    with bar("image features", len(samples), int(held.sum()), safe_point=preemption.leave) as update:
        try:
            for index, batch in samples.pictures(fits, moves, held):
                rows, places = np.unique(index, return_index=True)  # a group's last batch repeats its last row
                new = ~held[rows]
                for view, images in enumerate(batch):  # each is written before the next one takes its memory
                    computed = gather(run(params, shard_rows(images)))
                    if writer is not None:
                        for row, place in zip(rows[new].tolist(), places[new], strict=True):
                            writer.add(row * count + view, computed[place, : samples.needs.slots[row]].tobytes())
                held[rows], unsaved = True, unsaved + len(rows)
                if writer is not None and unsaved * FILES >= len(samples):
                    writer.flush()
                    unsaved = 0
                update(int(held.sum()), "")
        except (preemption.Preempted, KeyboardInterrupt):
            if writer is not None:
                writer.flush()
            raise
    one = _one(config, samples, dtype)
    meta = {"views": count, "shape": one.shape[2:], "dtype": str(one.dtype)}
    run_on_first(lambda: _finish(writer, partial, directory, meta))
    return StoredViews(directory, len(samples))


def _one(config: LMMConfig, samples: Samples, dtype: str) -> jax.ShapeDtypeStruct:
    """Shape and dtype of the features of the row with the fewest pictures, [1, M, N, D]."""
    pictured = np.flatnonzero(samples.needs.slots)
    if len(pictured):
        images = samples.alone(int(pictured[samples.needs.slots[pictured].argmin()]))["images"]
    else:
        images = next(samples.in_order(1))["images"]
    with sharding.without_mesh():  # which one row is not split over
        return jax.eval_shape(functional(config).features, abstract(config, dtype), images)


def feature_bytes(config: LMMConfig, samples: Samples, shift: int, dtype: str) -> int:
    """Returns the bytes of the image features of all rows, without computing them.

    Args:
        config: model config.
        samples: encoded records.
        shift: as in `image_features`.
        dtype: dtype of the features.
    """
    slots = samples.totals["slots"]
    if not slots:
        return 0
    one = _one(config, samples, dtype)
    return views(shift) * slots * math.prod(one.shape[2:]) * one.dtype.itemsize


def check_space(folder: Path, needed: int) -> None:
    """Raises AntgmmError if there is not enough space for the features in a folder, which need not exist yet."""
    free = shutil.disk_usage(nearest(folder)).free
    if needed > free and not (folder.exists() and any(folder.iterdir())):  # some are there already
        raise AntgmmError(
            f"image features in {folder} need {needed / 1e9:.3g} GB, but only {free / 1e9:.3g} GB are free: make"
            ' room, or set features = "recompute" in another --run'
        )


def _partial(directory: Path) -> Path:
    return directory.with_name(f".{directory.name}.tmp")


def _begin(partial: Path, samples: int, views: int) -> np.ndarray:
    """Starts or resumes a computation; returns which rows are stored already in all views, bool [samples]."""
    partial.mkdir(parents=True, exist_ok=True)
    for leftover in partial.glob(".*.tmp"):
        leftover.unlink()
    return np.asarray(Shards(partial, samples * views).held.reshape(samples, views).all(axis=1))


def _finish(writer: Writer | None, partial: Path, directory: Path, meta: dict[str, Any]) -> None:
    assert writer is not None  # this is the first process
    writer.flush()
    write_book(partial / "meta.json", meta)
    folders.publish(partial, directory)
