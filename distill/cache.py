"""The teacher cache: final hidden states at answer positions (and further states by name), one row per sample.

A cache is a folder: `meta.json` and one .npy per name, bfloat16 stored as its 16 bits because numpy files know no
bfloat16. It keeps the teacher's width, so it still serves after the student has been cut.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from antgmm_jax import processes, sharding
from antgmm_jax.errors import AntgmmError
from distill.chunked import at_positions

Params = Any
FLUSH_EVERY = 32  # batches between two points from which an interrupted build goes on
LENGTHS = {"encoder": "input_ids", "text": "input_ids", "decoder": "decoder_input_ids"}


class TeacherCache(NamedTuple):
    """An opened cache.

    Args:
        directory: where it lies.
        arrays: {name: bfloat16 array, sample first}: `final` [samples, A, Dt], `<tower>/states`
            [samples, layers + 1, N, D], `bridge/out` [samples, 1, N, D].
    """

    directory: Path
    arrays: dict[str, np.ndarray]

    def rows(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The cached rows of a host batch, cut to the batch's lengths.

        Args:
            batch: host batch with `index` [B], the samples' row numbers.

        Returns:
            {name: bfloat16 array, sample first}.

        Raises:
            AntgmmError: a row or a length beyond the cache.
        """
        index = np.asarray(batch["index"])
        found = {}
        for name, array in self.arrays.items():
            if index.min() < 0 or index.max() >= array.shape[0]:
                raise AntgmmError(f"teacher cache {self.directory} has {array.shape[0]} samples, not {index.max()}")
            length = _length(name, batch, array)
            if length > array.shape[-2]:
                raise AntgmmError(
                    f"teacher cache {self.directory} holds {array.shape[-2]} positions of {name}, "
                    f"a batch has {length}: build it again with like= a batch of the largest shape"
                )
            found[name] = array[index][..., :length, :]
        return found


def _length(name: str, batch: Mapping[str, np.ndarray], array: np.ndarray) -> int:
    """Positions of `name` that a batch needs: answers, the tower's tokens, or all of an image's."""
    if name == "final":
        return batch["positions"].shape[1]
    key = LENGTHS.get(name.split("/")[0])
    return array.shape[-2] if key is None else batch[key].shape[1]


def fingerprint(params: Params, data: str) -> str:
    """A hash of a teacher's parameters (paths, shapes, dtypes, bytes) and of the data it is run on.

    Args:
        params: the teacher's parameters.
        data: the data's own fingerprint.

    Returns:
        Hexadecimal SHA-256.
    """
    digest = hashlib.sha256(data.encode())
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        leaf = np.ascontiguousarray(processes.gather(leaf))
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype}".encode())
        digest.update(leaf.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def cache_size(
    functional: Any, params: Params, like: Mapping[str, np.ndarray], *, samples: int, names: tuple[str, ...]
) -> dict[str, int]:
    """Bytes that a cache would take on disk, by name; nothing is computed.

    Args:
        functional: the teacher's `Functional`.
        params: its parameters.
        like: a host batch of the largest shape.
        samples: number of samples.
        names: `final`, `<tower>/states`, `bridge/out`.

    Returns:
        {name: bytes}.
    """
    shapes = _row_shapes(functional, params, like, names)
    return {name: 2 * samples * int(np.prod(shape)) for name, shape in shapes.items()}


def build_cache(
    functional: Any,
    params: Params,
    batches: Iterable[Mapping[str, np.ndarray]],
    directory: Path,
    *,
    samples: int,
    like: Mapping[str, np.ndarray],
    key: str,
    names: tuple[str, ...] = ("final",),
    progress: Callable[[int, int], None] = lambda done, samples: None,
) -> None:
    """Runs the teacher once over all samples and writes its states; an interrupted build goes on where it was.

    Written to `<directory>.partial` and renamed when complete. A complete cache of the same key and names is left. All
    processes of a run call it, each with its own rows of the same batches; the first one writes.

    Args:
        functional: the teacher's `Functional`.
        params: its parameters, in the dtype they are to be computed in.
        batches: host batches with `index` [B] that together name every row 0 .. samples - 1; rows may repeat.
        directory: the folder to make.
        samples: number of samples.
        like: a host batch of the largest lengths; shorter ones are padded with zeros, which no loss reads.
        key: from `fingerprint`.
        names: what to store: `final`, and `<tower>/states` and `bridge/out` for losses that compare them.
        progress: called with (samples done, samples).

    Raises:
        AntgmmError: rows that no batch named, padding on the left, or no room on the disk.
    """
    names = tuple(dict.fromkeys(("final", *names)))
    shapes = {name: (samples, *row) for name, row in _row_shapes(functional, params, like, names).items()}
    meta = {"key": key, "shapes": {name: list(shape) for name, shape in shapes.items()}}
    if _meta(directory) == meta:
        return
    partial = directory.with_name(directory.name + ".partial")
    # Only the first process has the files; the others compute their rows and know which rows are in.
    arrays, done = processes.by_first(lambda: _open_partial(partial, meta, shapes)) or ({}, np.zeros(samples, bool))
    done = processes.from_first(done)
    run = jax.jit(lambda params, batch: _targets(functional, params, batch, names))
    for count, batch in enumerate(batches, 1):
        index = processes.gather(sharding.rows({"index": batch["index"]}))["index"]
        if not done[index].all():
            if len(names) > 1:
                _check_padding(batch)
            found = processes.gather(run(params, sharding.rows(_device(batch))))
            for name, array in arrays.items():
                array[index, ..., : found[name].shape[-2], :] = found[name].view(np.uint16)
            done[index] = True
        if arrays and count % FLUSH_EVERY == 0:
            _flush(partial, arrays, done)
        progress(int(done.sum()), samples)

    def finish() -> None:
        _flush(partial, arrays, done)
        if not done.all():
            raise AntgmmError(f"teacher cache {directory}: {int((~done).sum())} of {samples} samples were in no batch")
        (partial / "done.npy").unlink()
        if directory.exists():
            shutil.rmtree(directory)
        os.replace(partial, directory)

    processes.by_first(finish)


def open_cache(
    directory: Path, *, key: str, names: tuple[str, ...] = ("final",), in_memory: bool = False
) -> TeacherCache:
    """Opens a complete cache for reading.

    Args:
        directory: the folder.
        key: from `fingerprint`, of the teacher and data that the cache is to be used with.
        names: what to attach to each batch; `final` always is.
        in_memory: read the arrays whole instead of mapping the files.

    Returns:
        The `TeacherCache`.

    Raises:
        AntgmmError: no cache there, one of another teacher or data, or a name that it does not hold.
    """
    meta = _meta(directory)
    if meta is None:
        raise AntgmmError(f"no teacher cache at {directory}: build it first")
    if meta["key"] != key:
        raise AntgmmError(
            f"teacher cache {directory} is of another teacher or other data: delete it and build it again"
        )
    names = tuple(dict.fromkeys(("final", *names)))
    lacking = [name for name in names if name not in meta["shapes"]]
    if lacking:
        raise AntgmmError(f"teacher cache {directory} lacks {', '.join(lacking)}: it holds {', '.join(meta['shapes'])}")
    arrays = {}
    for name in names:
        try:
            array = np.load(_file(directory, name), mmap_mode=None if in_memory else "r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise AntgmmError(f"teacher cache file {_file(directory, name)} is damaged: delete the cache") from error
        arrays[name] = array.view(ml_dtypes.bfloat16)
    return TeacherCache(directory, arrays)


def _targets(functional: Any, params: Params, batch: dict, names: tuple[str, ...]) -> dict[str, jax.Array]:
    """{name: bfloat16 [B, ..., positions, width]}."""
    out = functional.apply(params, batch, collect=names)
    rows = {name: jnp.swapaxes(out[name], 0, 1) for name in names if name != "final"}
    rows["final"] = at_positions(out["final"], batch["positions"])
    return {name: rows[name].astype(jnp.bfloat16) for name in names}


def _device(batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: value for name, value in batch.items() if name not in ("id", "index")}


def _row_shapes(functional: Any, params: Params, like: Mapping, names: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    found = jax.eval_shape(lambda params, batch: _targets(functional, params, batch, names), params, _device(like))
    return {name: value.shape[1:] for name, value in found.items()}


def _check_padding(batch: Mapping[str, np.ndarray]) -> None:
    # Rows are cut on the right to a batch's length; with padding on the left another token would be read.
    if "attention_mask" in batch and not np.asarray(batch["attention_mask"])[:, 0].all():
        raise AntgmmError("teacher cache: a batch is padded on the left; pad input_ids on the right")


def _file(directory: Path, name: str) -> Path:
    return directory / (name.replace("/", ".") + ".npy")


def _meta(directory: Path) -> dict | None:
    path = directory / "meta.json"
    return json.loads(path.read_text()) if path.exists() else None


def _open_partial(
    partial: Path, meta: dict, shapes: dict[str, tuple[int, ...]]
) -> tuple[dict[str, np.memmap], np.ndarray]:
    """The arrays under construction and which rows are in; those of an interrupted build of the same meta."""
    samples = next(iter(shapes.values()))[0]
    if _meta(partial) == meta and (partial / "done.npy").exists():
        return {name: np.load(_file(partial, name), mmap_mode="r+") for name in shapes}, np.load(partial / "done.npy")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    arrays = {name: _allocate(_file(partial, name), shape) for name, shape in shapes.items()}
    done = np.zeros(samples, bool)
    (partial / "meta.json").write_text(json.dumps(meta))
    return arrays, done


def _allocate(path: Path, shape: tuple[int, ...]) -> np.memmap:
    """A zeroed, mapped uint16 .npy whose blocks are reserved: a full disk is an error here, not a crash at a write."""
    array = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint16, shape=shape)
    try:
        if hasattr(os, "posix_fallocate"):  # Linux
            with path.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    except OSError as error:
        shutil.rmtree(path.parent)
        raise AntgmmError(
            f"teacher cache {path.parent}: {array.nbytes / 1e9:.1f} GB do not fit: {error.strerror}"
        ) from error
    return array


def _flush(partial: Path, arrays: dict[str, np.memmap], done: np.ndarray) -> None:
    for array in arrays.values():
        array.flush()
    temporary = partial / "done.tmp.npy"
    np.save(temporary, done)
    os.replace(temporary, partial / "done.npy")
