"""The teacher cache: final hidden states at answer positions and other states, one row per sample.

A cache is a folder with `meta.json` and ArrayRecord files; every process writes its own rows. Each row is one record
of `distill.records`: its states, one name after another, without padding. States have the teacher's width, so the cache
is independent of the student's.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from antgmm_jax.errors import AntgmmError
from antgmm_jax.io.books import read_book
from antgmm_jax.io.shards import Shards
from antgmm_jax.io.stored import Stored
from antgmm_jax.parallel import processes
from distill.records import FORMAT, Shapes, axis_of, ragged, restored

Params = Any
LENGTHS = {"text": "input_ids", "answer": "targets"}
"""Array of a batch with as many columns as the positions of a state, by `ragged`."""


class TeacherCache(NamedTuple):
    """An open teacher cache.

    Attributes:
        directory: its folder.
        samples: number of rows.
        shapes: name -> shape of the longest row: `final` [A, Dt], names of `distill.top` [A, U], `<tower>/states`
            [layers + 1, N, D] (image towers [slots, layers + 1, N, D]), `bridge/out` [slots, 1, N, D].
        read: row numbers [B] -> {name: [B, *shape]} in bfloat16 (uint16 for names of `distill.top`), with zeros behind
            the last position of each row; `names` selects states.
    """

    directory: Path
    samples: int
    shapes: Shapes
    read: Callable[..., dict[str, np.ndarray]]

    def only(self, names: Sequence[str]) -> "TeacherCache":
        """Returns the same cache for reading some of its states; rows in memory are shared."""
        return self._replace(shapes={name: self.shapes[name] for name in names}, read=partial(self.read, names=names))

    def rows(self, batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Reads the rows of a host batch, cut to the batch's lengths and image slots.

        Args:
            batch: host batch with `index` [B], the row numbers of the samples.

        Returns:
            name -> bfloat16 [B, ...]; uint16 for names of `distill.top`.

        Raises:
            AntgmmError: the batch has rows or lengths that the cache does not hold, or a file is damaged.
        """
        index = np.asarray(batch["index"])
        if index.min() < 0 or index.max() >= self.samples:
            raise AntgmmError(f"teacher cache {self.directory} has {self.samples} samples, not {index.max()}")
        lengths = {name: self._length(name, batch) for name in self.shapes}
        rows = self.read(index)
        return {name: states[(slice(None),) * axis_of(name) + (slice(lengths[name]),)] for name, states in rows.items()}

    def _length(self, name: str, batch: Mapping[str, Any]) -> int:
        """Positions or image slots of `name` in a batch."""
        kind, held = ragged(name), self.shapes[name][axis_of(name) - 1]
        length = batch["images"]["valid"].shape[1] if kind == "slots" else batch[LENGTHS[kind]].shape[1]
        if length > held:
            what = "image slots" if kind == "slots" else f"positions of {name}"
            raise AntgmmError(
                f"teacher cache {self.directory} holds {held} {what}, a batch has {length}: build it again with like="
                " a batch of the largest shape"
            )
        return length


def fingerprint(params: Params, data: str) -> str:
    """Computes a hash of a teacher's parameters (paths, shapes, dtypes, bytes) and of other inputs.

    Args:
        params: parameters of the teacher; `Stored` ones are read layer by layer.
        data: description of the other inputs, such as config and a digest of the processed data.

    Returns:
        Hexadecimal SHA-256.
    """
    digest = hashlib.sha256(data.encode())
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype}".encode())
        for part in leaf.parts() if isinstance(leaf, Stored) else [processes.gather(leaf)]:
            digest.update(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def has_cache(directory: Path, *, key: str, names: tuple[str, ...]) -> bool:
    """Whether a complete cache with this key and these states exists.

    Args:
        directory: folder of the cache.
        key: expected key, from `fingerprint`.
        names: states to read.
    """
    meta = read_meta(directory)
    return meta is not None and meta.get("format") == FORMAT and meta["key"] == key and {*names} <= {*meta["shapes"]}


def stored_names(directory: Path, key: str) -> tuple[str, ...]:
    """Returns the states that a cache holds; none if it is incomplete or has another key.

    Args:
        directory: folder of the cache.
        key: expected key, from `fingerprint`.
    """
    meta = read_meta(directory) if has_cache(directory, key=key, names=()) else None
    return (*meta["shapes"],) if meta else ()


def open_cache(
    directory: Path, *, key: str, names: tuple[str, ...] = ("final",), in_memory: bool = False
) -> TeacherCache:
    """Opens a complete cache for reading.

    Args:
        directory: folder of the cache.
        key: expected key, from `fingerprint`.
        names: states to read.
        in_memory: load all rows into memory, instead of reading those of each batch.

    Returns:
        The cache.

    Raises:
        AntgmmError: the cache is missing, incomplete or damaged, has another key (another teacher, processor or data),
            or lacks a name.
    """
    meta = read_meta(directory)
    if meta is None:
        raise AntgmmError(f"no teacher cache at {directory}: build it first")
    if meta.get("format") != FORMAT:
        raise AntgmmError(f"teacher cache {directory} was written by another version: delete it and build it again")
    if meta["key"] != key:
        raise AntgmmError(
            f"teacher cache {directory} belongs to another teacher, processor or data: delete it and build it again"
        )
    missing = [name for name in names if name not in meta["shapes"]]
    if missing:
        raise AntgmmError(f"teacher cache {directory} lacks {', '.join(missing)}: it holds {', '.join(meta['shapes'])}")
    samples, shapes = meta["samples"], {name: tuple(shape) for name, shape in meta["shapes"].items()}
    shards = Shards(directory, samples, directory)
    records = [shards[row] for row in range(samples)] if in_memory else shards
    read = partial(_read, records, shapes, names=names)
    return TeacherCache(directory, samples, {name: shapes[name] for name in names}, read)


def _read(
    records: Shards | Sequence[bytes], shapes: Shapes, index: np.ndarray, *, names: Sequence[str]
) -> dict[str, np.ndarray]:
    return restored([records[int(row)] for row in index], shapes, names)


def read_meta(directory: Path) -> dict[str, Any] | None:
    """Reads `format`, `key`, `samples` and `shapes` from `meta.json` of a cache; None if it does not exist."""
    path = directory / "meta.json"
    return read_book(path, f"remove {directory} and run it again") if path.exists() else None
