"""The teacher cache: final hidden states at answer positions, or further states by name, one row per sample.

A cache is a folder: `meta.json`, and ArrayRecord files that each process wrote for its own rows. A row is one record:
its states in bfloat16, name after name, padded to the longest. It keeps the teacher's width, so it still serves after
the student has been cut.
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
from antgmm_jax.parallel import processes

Params = Any
Shapes = dict[str, tuple[int, ...]]
LENGTHS = {"encoder": "input_ids", "text": "input_ids", "decoder": "decoder_input_ids"}


class TeacherCache(NamedTuple):
    """An opened cache.

    Attributes:
        directory: where it lies.
        samples: number of its rows.
        shapes: of a row, by name: `final` [A, Dt], `<tower>/states` [layers + 1, N, D], of image towers
            [slots, layers + 1, N, D], `bridge/out` [slots, 1, N, D].
        read: row numbers [B] -> {name: bfloat16 [B, *shape]}.
    """

    directory: Path
    samples: int
    shapes: Shapes
    read: Callable[[np.ndarray], dict[str, np.ndarray]]

    def rows(self, batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """The cached rows of a host batch, cut to the batch's lengths and picture slots.

        Args:
            batch: host batch with `index` [B], the samples' row numbers.

        Returns:
            {name: bfloat16 array, sample first}.

        Raises:
            AntgmmError: a row or a length beyond the cache, or a damaged file.
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
        found = {name: rows[..., : lengths[name], :] for name, rows in self.read(index).items()}
        return {
            name: rows[:, : self._slots(name, batch)] if of_pictures(name) else rows for name, rows in found.items()
        }

    def _slots(self, name: str, batch: Mapping[str, Any]) -> int:
        slots, held = batch["images"]["valid"].shape[1], self.shapes[name][0]
        if slots > held:
            raise AntgmmError(
                f"teacher cache {self.directory} holds {held} picture slots, a batch has {slots}: build it again with"
                " like= a batch of the largest shape"
            )
        return slots


def of_pictures(name: str) -> bool:
    """Whether states of that name stand picture by picture, not token by token."""
    return name != "final" and name.split("/")[0] not in LENGTHS


def _length(name: str, batch: Mapping[str, Any], shape: Sequence[int]) -> int:
    """Positions of `name` that a batch needs: answers, the tower's tokens, or all of an image's."""
    if name == "final":
        return batch["positions"].shape[1]
    key = LENGTHS.get(name.split("/")[0])
    return shape[-2] if key is None else batch[key].shape[1]


def fingerprint(params: Params, data: str) -> str:
    """A hash of a teacher's parameters (paths, shapes, dtypes, bytes) and of what else its states depend on.

    Args:
        params: the teacher's parameters.
        data: the rest, such as its config and a digest of the processed data.

    Returns:
        Hexadecimal SHA-256.
    """
    digest = hashlib.sha256(data.encode())
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        leaf = np.ascontiguousarray(processes.gather(leaf))
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype}".encode())
        digest.update(leaf.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def open_cache(
    directory: Path, *, key: str, names: tuple[str, ...] = ("final",), in_memory: bool = False
) -> TeacherCache:
    """Opens a complete cache for reading.

    Args:
        directory: the folder.
        key: from `fingerprint`, of what the cache is to be used with.
        names: what to attach to each batch.
        in_memory: hold all rows in memory instead of reading those of each batch.

    Returns:
        The `TeacherCache`.

    Raises:
        AntgmmError: no cache there, one of another teacher, processor or data, a damaged one, or one that lacks a
            name.
    """
    meta = read_meta(directory)
    if meta is None:
        raise AntgmmError(f"no teacher cache at {directory}: build it first")
    if meta["key"] != key:
        raise AntgmmError(
            f"teacher cache {directory} is of another teacher, processor or other data: delete it and build it again"
        )
    lacking = [name for name in names if name not in meta["shapes"]]
    if lacking:
        raise AntgmmError(f"teacher cache {directory} lacks {', '.join(lacking)}: it holds {', '.join(meta['shapes'])}")
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
    """{name: bfloat16 [B, *shape]} for some of the names that each record holds."""
    arrays = {name: np.empty((len(index), math.prod(shapes[name])), ml_dtypes.bfloat16) for name in names}
    ends = dict(zip(shapes, np.cumsum([math.prod(shape) for shape in shapes.values()]).tolist(), strict=True))
    for place, row in enumerate(index):
        record = np.frombuffer(shards[row], ml_dtypes.bfloat16)
        for name, array in arrays.items():
            array[place] = record[ends[name] - array.shape[1] : ends[name]]
    return {name: array.reshape(-1, *shapes[name]) for name, array in arrays.items()}


def read_meta(directory: Path) -> dict[str, Any] | None:
    """What `meta.json` of a cache says: `key`, `samples` and `shapes` of a row by name; None where there is none."""
    path = directory / "meta.json"
    return json.loads(path.read_text()) if path.exists() else None
