"""Prefetched batches in a reproducible random order that can resume at any batch."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import SupportsIndex

import grain
import numpy as np

from antgmm_jax.errors import AntgmmError
from data.record import Arrays

_ENDLESS = 2**48
Make = Callable[[np.ndarray, np.random.Generator], Arrays]
"""(row numbers, random generator) -> batch; the generator is the same whenever the batch is created again."""


class Batches(Iterator[Arrays]):
    """An endless iterator of batches; its position is the number of the next batch."""

    def __init__(self, dataset: grain.MapDataset, prefetch: int, threads: int = 1):
        # By default grain prefetches 500 batches, gigabytes of pixels.
        options = grain.ReadOptions(num_threads=min(prefetch, threads), prefetch_buffer_size=prefetch)
        self._iterator = iter(dataset.to_iter_dataset(options))

    def __next__(self) -> Arrays:
        return next(self._iterator)

    @property
    def position(self) -> dict[str, int]:
        """Position of the iterator for a checkpoint, `{"next_index": n}`."""
        return {"next_index": int(self._iterator.get_state()["next_index"])}

    def seek(self, position: Mapping[str, int]) -> None:
        """Continues from a position of this or an earlier iterator over the same data.

        Args:
            position: value of `position`.
        """
        self._iterator.set_state({"next_index": int(position["next_index"])})


class Plan(Sequence[np.ndarray]):
    """Batch number -> row numbers. Every epoch is a new permutation; rows of one shape share batches."""

    def __init__(self, groups: np.ndarray, size: int, seed: int):
        self.groups, self.size, self.seed = groups, size, seed
        self.per_epoch = len(groups) // size
        # The current epoch and, while prefetching, the next one.
        self._epoch = lru_cache(maxsize=2)(self._make)

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, index: SupportsIndex) -> np.ndarray:
        epoch, place = divmod(int(index), self.per_epoch)
        return self._epoch(epoch)[place]

    def _make(self, epoch: int) -> np.ndarray:
        rng = np.random.Generator(np.random.PCG64([self.seed, epoch]))
        # Rows that this epoch leaves out are drawn before they are grouped: else they would be those of small groups.
        rows = rng.permutation(len(self.groups))[: self.per_epoch * self.size].astype(np.int32)  # half of int64
        # Full batches of one group each; leftover rows are mixed.
        full, rest = [], []
        for group in np.unique(self.groups):
            inside = rows[self.groups[rows] == group]
            cut = len(inside) // self.size * self.size
            full.append(inside[:cut])
            rest.append(inside[cut:])
        rest = rng.permutation(np.concatenate(rest))
        batches = np.concatenate([*full, rest]).reshape(self.per_epoch, self.size)
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
    """Returns an endless iterator of shuffled batches; equal arguments give equal batches.

    Every epoch visits each row once, except for a remainder smaller than a batch. With several processes, all use the
    same order and each creates the rows of its own devices.

    Args:
        make: (row numbers, random generator) -> batch; called ahead of time in threads.
        groups: number of the shape that each row needs, [N]; the rows of a batch have one shape, except in the few
            batches of leftover rows.
        size: rows per batch.
        seed: seed of the order and of the random generators.
        visits: row numbers that an epoch visits (repeated for several visits); None for all rows once.
        prefetch: number of batches created ahead of time; 0 for none.
        threads: number of threads that create batches.

    Returns:
        Iterator of batches.

    Raises:
        AntgmmError: there are fewer rows than `size`.
    """
    rows = np.arange(len(groups), dtype=np.int32) if visits is None else visits
    if len(rows) < size:
        raise AntgmmError(f"a batch of {size} needs at least as many rows, but the data has {len(rows)}")

    def of_rows(places: np.ndarray, rng: np.random.Generator) -> Arrays:
        return make(rows[places], rng)

    order = grain.MapDataset.source(Plan(groups[rows], size, seed))
    return Batches(order.random_map(of_rows, seed=seed), max(prefetch, threads if prefetch else 0), threads)


def sequential_batches(order: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Splits row numbers into batches of equal size; the last batch is filled up with its last row.

    Args:
        order: row numbers.
        size: rows per batch.

    Yields:
        int [size].
    """
    for first in range(0, len(order), size):
        yield order[np.minimum(np.arange(first, first + size), len(order) - 1)]
