"""The teacher cache: final hidden states at answer positions and other states, one row per sample.

A cache is a folder with `meta.json` and ArrayRecord files; every process writes its own rows. Each row is one record:
its states in bfloat16, one name after another, padded to the longest sample. States have the teacher's width, so the
cache is independent of the student's.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np

from antgmm_jax.errors import AntgmmError
from antgmm_jax.io.shards import Shards
from antgmm_jax.io.stored import Stored
from antgmm_jax.parallel import processes

Params = Any
Shapes = dict[str, tuple[int, ...]]
LENGTHS = {"encoder": "input_ids", "text": "input_ids", "decoder": "decoder_input_ids"}


class TeacherCache(NamedTuple):
    """An open teacher cache.

    Attributes:
        directory: its folder.
        samples: number of rows.
        shapes: name -> shape of a row: `final` [A, Dt], `<tower>/states` [layers + 1, N, D] (image towers
            [slots, layers + 1, N, D]), `bridge/out` [slots, 1, N, D].
        read: row numbers [B] -> {name: bfloat16 [B, *shape]}.
    """

    directory: Path
    samples: int
    shapes: Shapes
    read: Callable[[np.ndarray], dict[str, np.ndarray]]

    def rows(self, batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Reads the rows of a host batch, cut to the batch's lengths and image slots.

        Args:
            batch: host batch with `index` [B], the row numbers of the samples.

        Returns:
            name -> bfloat16 [B, ...].

        Raises:
            AntgmmError: the batch has rows or lengths that the cache does not hold, or a file is damaged.
        """
        index = np.asarray(batch["index"])
        if index.min() < 0 or index.max() >= self.samples:
            raise AntgmmError(f"teacher cache {self.directory} has {self.samples} samples, not {index.max()}")
        lengths = {name: _length(name, batch, shape) for name, shape in self.shapes.items()}
        for name, length in lengths.items():
            if length > self.shapes[name][-2]:
                raise AntgmmError(
                    f"teacher cache {self.directory} holds {self.shapes[name][-2]} positions of {name}, "
                    f"a batch has {length}: build it again with like= a batch of the largest shape"
                )
        states = {name: rows[..., : lengths[name], :] for name, rows in self.read(index).items()}
        return {
            name: rows[:, : self._slots(name, batch)] if has_image_slots(name) else rows
            for name, rows in states.items()
        }

    def _slots(self, name: str, batch: Mapping[str, Any]) -> int:
        slots, held = batch["images"]["valid"].shape[1], self.shapes[name][0]
        if slots > held:
            raise AntgmmError(
                f"teacher cache {self.directory} holds {held} image slots, a batch has {slots}: build it again with"
                " like= a batch of the largest shape"
            )
        return slots


def has_image_slots(name: str) -> bool:
    """Whether states of this name have one entry per image slot (not one per sample)."""
    return name != "final" and name.split("/")[0] not in LENGTHS


def _length(name: str, batch: Mapping[str, Any], shape: Sequence[int]) -> int:
    """Positions of `name` in a batch: answer tokens, the tower's tokens, or all positions of an image."""
    if name == "final":
        return batch["positions"].shape[1]
    key = LENGTHS.get(name.split("/")[0])
    return shape[-2] if key is None else batch[key].shape[1]


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
    return meta is not None and meta["key"] == key and {*names} <= {*meta["shapes"]}


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
    if meta["key"] != key:
        raise AntgmmError(
            f"teacher cache {directory} belongs to another teacher, processor or data: delete it and build it again"
        )
    missing = [name for name in names if name not in meta["shapes"]]
    if missing:
        raise AntgmmError(f"teacher cache {directory} lacks {', '.join(missing)}: it holds {', '.join(meta['shapes'])}")
    samples, shapes = meta["samples"], {name: tuple(shape) for name, shape in meta["shapes"].items()}
    shards = Shards(directory, samples)
    if not shards.held.all():
        raise AntgmmError(
            f"teacher cache {directory} is damaged, a file is missing: delete {directory} and build it again"
        )
    read = partial(_read, shards, shapes, names)
    if in_memory:
        read = partial(_take, read(np.arange(samples)))
    return TeacherCache(directory, samples, {name: shapes[name] for name in names}, read)


def _take(arrays: dict[str, np.ndarray], index: np.ndarray) -> dict[str, np.ndarray]:
    return {name: array[index] for name, array in arrays.items()}


def _read(shards: Shards, shapes: Shapes, names: Sequence[str], index: np.ndarray) -> dict[str, np.ndarray]:
    """Reads the states `names` of rows; returns name -> bfloat16 [B, *shape]."""
    arrays = {name: np.empty((len(index), math.prod(shapes[name])), ml_dtypes.bfloat16) for name in names}
    ends = dict(zip(shapes, np.cumsum([math.prod(shape) for shape in shapes.values()]).tolist(), strict=True))
    for place, row in enumerate(index):
        record = np.frombuffer(shards[int(row)], ml_dtypes.bfloat16)
        for name, array in arrays.items():
            array[place] = record[ends[name] - array.shape[1] : ends[name]]
    return {name: array.reshape(-1, *shapes[name]) for name, array in arrays.items()}


def read_meta(directory: Path) -> dict[str, Any] | None:
    """Reads `key`, `samples` and `shapes` from `meta.json` of a cache; None if it does not exist."""
    path = directory / "meta.json"
    return json.loads(path.read_text()) if path.exists() else None
