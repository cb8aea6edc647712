"""Batches in a fixed random order, from memory or drawn on the fly, that can be resumed at any batch."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple, SupportsIndex

import grain
import numpy as np

from antgmm_jax.errors import AntgmmError
from antgmm_jax.sharding import own_rows, whole_rows
from data.record import Arrays
from data.shifting import seen

_ENDLESS = 2**48
_ANSWER = ("targets", "positions", "decoder_input_ids", "labels")
_PROMPT = ("input_ids", "attention_mask")
_INPUT = (*_PROMPT, "labels")


class Batches(Iterator[Arrays]):
    """An endless iterator of batches whose position is one number: the batch that comes next."""

    def __init__(self, dataset: grain.MapDataset, prefetch: int):
        # grain's own default keeps 500 batches ahead, gigabytes of pixels.
        options = grain.ReadOptions(num_threads=min(prefetch, 1), prefetch_buffer_size=prefetch)
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
    """Batch number -> row numbers: every epoch is a permutation of its own, sorted into length groups."""

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


def answer_lengths(arrays: Arrays) -> np.ndarray:
    """Answer tokens of each row of `data.encoding.encode`, the end token counted; int [N]."""
    return (arrays["targets"] >= 0).sum(axis=1)


def lengths(arrays: Arrays) -> np.ndarray:
    """What the length groups go by: answer tokens where a decoder reads them apart (T5), else all tokens.

    Args:
        arrays: from `data.encoding.encode`.

    Returns:
        int [N].
    """
    if "decoder_input_ids" in arrays:
        return answer_lengths(arrays)
    return arrays["attention_mask"].sum(axis=1)


class Cut(NamedTuple):
    """Which padding a batch is cut off: columns beyond the narrowest of some widths that holds all its rows.

    Attributes:
        names: the arrays that are cut.
        tokens: of each row of the data, int [N].
        widths: in ascending order.
    """

    names: tuple[str, ...]
    tokens: np.ndarray
    widths: tuple[int, ...]

    def groups(self) -> np.ndarray:
        """Which of the widths each row needs, int [N]."""
        return np.searchsorted(self.widths, self.tokens)

    def __call__(self, batch: Arrays, index: np.ndarray) -> Arrays:
        """The batch of the rows `index`, cut."""
        width = self.widths[np.searchsorted(self.widths, self.tokens[index].max())]
        return {name: value[:, :width] if name in self.names else value for name, value in batch.items()}


def cuts(arrays: Arrays, widths: Sequence[int], prompts: Sequence[int] = ()) -> tuple[Cut, ...]:
    """How batches are cut to length buckets.

    Args:
        arrays: from `data.encoding.encode`.
        widths: of answer columns where a decoder reads them apart (T5), else of all; empty: no cutting.
        prompts: of what an encoder reads; empty: no cutting.

    Returns:
        One cut for each that is not empty.

    Raises:
        AntgmmError: a row longer than every bucket.
    """
    t5, found = "decoder_input_ids" in arrays, []
    if widths:
        found.append(Cut(_ANSWER if t5 else _INPUT, lengths(arrays), tuple(sorted(widths))))
    if prompts:
        found.append(Cut(_PROMPT, arrays["attention_mask"].sum(axis=1), tuple(sorted(prompts))))
    for cut in found:
        if (most := cut.tokens.max()) > cut.widths[-1]:
            raise AntgmmError(f"the widest length bucket is {cut.widths[-1]} but a row has {most} tokens: add a bucket")
    return tuple(found)


def batches(
    arrays: Arrays,
    *,
    size: int,
    seed: int,
    widths: Sequence[int] = (),
    prompts: Sequence[int] = (),
    rows: np.ndarray | None = None,
    shift: int = 0,
    finish: Callable[[Arrays], Arrays] | None = None,
    prefetch: int = 2,
) -> Batches:
    """Endless shuffled batches of rows held in memory.

    Every epoch visits each row once, but for the last N modulo `size`; equal arguments give equal batches.
    Where several processes share a mesh, all go through the same batches and each makes the rows of its own devices.

    Args:
        arrays: name -> array with N rows, such as `data.encoding.encode` makes; of `views` [N, V, ...] of the image
            features one is drawn whenever a row is seen, and given as `vision_features`.
        size: rows a batch.
        seed: seed of the order and of what is drawn.
        widths: length buckets, one compiled program each; a batch holds rows of one bucket and is cut to it, but for
            the few that mix what is left over. Empty: no cutting.
        prompts: the same for the prompts that an encoder reads; each pair of buckets is a group and a program.
        rows: which rows an epoch visits, and each as often as it stands there; None: all once.
        shift: pixels by which each of a batch's `images` is moved at random, at most, each way.
        finish: last step on a batch, such as a partial `data.processor.device_batch`; runs ahead in a thread.
        prefetch: batches made ahead of time; 0 makes each when it is asked for.

    Returns:
        An iterator of dicts of arrays, `index` (row numbers) among them.

    Raises:
        AntgmmError: fewer rows than a batch needs, arrays of different lengths, a row longer than every bucket, or a
            batch that does not divide by a mesh's devices.
    """
    counts = {name: len(value) for name, value in arrays.items()}
    if len(set(counts.values())) != 1:
        raise AntgmmError(f"arrays of one data set must have equally many rows, not {counts}")
    rows = np.arange(next(iter(counts.values()))) if rows is None else rows
    if len(rows) < size:
        raise AntgmmError(f"a batch of {size} needs as many rows; the data has {len(rows)}")

    # Asked for here: the thread that makes batches has no mesh.
    own, applied = own_rows(size), cuts(arrays, widths, prompts)

    def make(places: np.ndarray, rng: np.random.Generator) -> Arrays:
        batch = _rows(arrays, rows[places], own, applied)
        batch = seen(batch, rng, shift=shift, shape=places.shape, own=own)
        return batch if finish is None else finish(batch)

    groups = np.zeros(len(rows), int)
    for cut in applied:
        groups = groups * len(cut.widths) + cut.groups()[rows]
    return Batches(grain.MapDataset.source(Plan(groups, size, seed)).random_map(make, seed=seed), prefetch)


def once(arrays: Arrays, *, size: int, order: np.ndarray | None = None, widths: Sequence[int] = ()) -> Iterator[Arrays]:
    """Every row once; the last batch repeats its last row, so that one shape is compiled.

    Args:
        arrays: as in `batches`.
        size: rows a batch; under a mesh the next number that its devices divide.
        order: the rows in the order to visit them; None: as they stand.
        widths: length buckets; each batch is cut to the one that its longest row needs. Empty: no cutting.

    Yields:
        Batches with `index`, the rows' numbers; under a mesh the rows of this process's devices.
    """
    order = np.arange(len(next(iter(arrays.values())))) if order is None else order
    size = whole_rows(size)
    own, applied = own_rows(size), cuts(arrays, widths)
    for first in range(0, len(order), size):
        places = np.minimum(np.arange(first, first + size), len(order) - 1)
        yield _rows(arrays, order[places], own, applied)


def _rows(arrays: Arrays, index: np.ndarray, own: np.ndarray, applied: Sequence[Cut]) -> Arrays:
    """This process's rows of a batch, cut to the widths that the longest of all of them need."""
    batch = {name: value[index[own]] for name, value in arrays.items()}
    for cut in applied:
        batch = cut(batch, index)
    return {**batch, "index": index[own].astype(np.int32)}
