"""Batches in a fixed random order, made ahead of time, that can be resumed at any batch."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import SupportsIndex

import grain
import numpy as np

from antgmm_jax.errors import AntgmmError
from data.record import Arrays

_ENDLESS = 2**48
Make = Callable[[np.ndarray, np.random.Generator], Arrays]
"""Row numbers of a batch, and a source of chance that is the same whenever it is made again -> the batch."""


class Batches(Iterator[Arrays]):
    """An endless iterator of batches with a position that is one number: the batch that comes next."""

    def __init__(self, dataset: grain.MapDataset, prefetch: int, threads: int = 1):
        # grain's own default keeps 500 batches ahead, gigabytes of pixels.
        options = grain.ReadOptions(num_threads=min(prefetch, threads), prefetch_buffer_size=prefetch)
        self._iterator = iter(dataset.to_iter_dataset(options))

    def __next__(self) -> Arrays:
        return next(self._iterator)

    @property
    def position(self) -> dict[str, int]:
        """Where the iterator stands, `{"next_index": n}`: JSON-able, for a checkpoint."""
        return {"next_index": int(self._iterator.get_state()["next_index"])}

    def seek(self, position: Mapping[str, int]) -> None:
        """Goes on from a position of this or an earlier iterator over the same data.

        Args:
            position: what `position` gave.
        """
        self._iterator.set_state({"next_index": int(position["next_index"])})


class Plan(Sequence[np.ndarray]):
    """Batch number -> row numbers: every epoch is a permutation of its own, sorted into groups of one shape."""

    def __init__(self, groups: np.ndarray, size: int, seed: int):
        self.groups, self.size, self.seed = groups, size, seed
        self.per_epoch = len(groups) // size
        # The epoch at hand, and its neighbour while batches are made ahead of time.
        self._epoch = lru_cache(maxsize=2)(self._make)

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, index: SupportsIndex) -> np.ndarray:
        epoch, place = divmod(int(index), self.per_epoch)
        return self._epoch(epoch)[place]

    def _make(self, epoch: int) -> np.ndarray:
        rng = np.random.Generator(np.random.PCG64([self.seed, epoch]))
        rows = rng.permutation(len(self.groups))
        # Whole batches of one group each; what is left of the groups is mixed, and the last few wait an epoch.
        full, rest = [], []
        for group in np.unique(self.groups):
            inside = rows[self.groups[rows] == group]
            cut = len(inside) // self.size * self.size
            full.append(inside[:cut])
            rest.append(inside[cut:])
        rest = rng.permutation(np.concatenate(rest))
        batches = np.concatenate([*full, rest])[: self.per_epoch * self.size].reshape(self.per_epoch, self.size)
        return rng.permutation(batches)


def batches(
    make: Make,
    groups: np.ndarray,
    *,
    size: int,
    seed: int,
    visits: np.ndarray | None = None,
    prefetch: int = 2,
    threads: int = 1,
) -> Batches:
    """Endless shuffled batches.

    Every epoch visits each row once, but for the last N modulo `size`; equal arguments give equal batches.
    Where several processes share a mesh, all go through the same batches and each makes the rows of its own devices.

    Args:
        make: makes a batch of its row numbers; runs ahead in threads.
        groups: which shape each row needs, [N]; a batch holds rows of one, but for the few that mix what is left over.
        size: rows a batch.
        seed: seed of the order and of what `make` draws.
        visits: which rows an epoch visits, and each as often as it stands there; None: all once.
        prefetch: batches made ahead of time; 0 makes each when it is asked for.
        threads: that make them, each a batch of its own.

    Returns:
        An iterator of batches.

    Raises:
        AntgmmError: fewer rows than a batch needs.
    """
    rows = np.arange(len(groups)) if visits is None else visits
    if len(rows) < size:
        raise AntgmmError(f"a batch of {size} needs as many rows; the data has {len(rows)}")

    def of_rows(places: np.ndarray, rng: np.random.Generator) -> Arrays:
        return make(rows[places], rng)

    order = grain.MapDataset.source(Plan(groups[rows], size, seed))
    return Batches(order.random_map(of_rows, seed=seed), max(prefetch, threads if prefetch else 0), threads)


def visits_once(order: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Row numbers of batches that visit each row once; the last repeats its last row, so that one shape is compiled.

    Args:
        order: the rows in the order to visit them.
        size: rows a batch.

    Yields:
        int [size].
    """
    for first in range(0, len(order), size):
        yield order[np.minimum(np.arange(first, first + size), len(order) - 1)]
