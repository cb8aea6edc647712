"""Stage and step checkpoints: arrays by Orbax, with a JSON record; a folder is complete or absent.

Both kinds of checkpoint have the same layout::

    DIR/arrays/                     one Orbax checkpoint, a flat dict leaf name -> array
    DIR/stage.json (or step.json)   the caller's record, library versions, tables of leaves and files

A checkpoint is written under a hidden temporary name, flushed to disk and renamed. If the process is killed or the
disk is full, the folder is either complete or absent. Pickle is not used.

Only this file and `orbax_errors` use Orbax.
"""

# Orbax 0.12.8 writes and reads the arrays, but its `training.Checkpointer` is not used for the record, the commit and
# the retention of steps. It is about as fast (150 arrays, 120 MB: 0.36 s, ours with checksums 0.48 s; 8 MB: 0.15 s
# both), but gives weaker guarantees, as measured on 2026-11-28 (AMD EPYC, Linux, Python 3.11):
# * It deletes in place: when killed 12 times while saving with `LatestN(2)`, it once listed a half-removed step.
# * It loads a data file with a changed byte without an error, with wrong numbers: its zstd has no checksum.
# * It loads a truncated or missing `_CHECKPOINT_METADATA` as an empty record, without an error.
# * It flushes neither the metadata files nor the final rename to disk (strace: every fsync is TensorStore's).

import contextlib
import errno
import functools
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from os.path import exists
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp

from antgmm_jax.errors import AntgmmError
from antgmm_jax.extras import versions_of
from antgmm_jax.io import folders
from antgmm_jax.io.books import read_book, sealed
from antgmm_jax.io.leaves import (
    as_saved,
    assert_same_leaves,
    checked_leaves,
    describe,
    empty,
    named_leaves,
    target_at,
    target_of,
)
from antgmm_jax.io.orbax_errors import silent, wait_for_threads
from antgmm_jax.io.packed import packed, unpacked
from antgmm_jax.parallel import processes

STAGE_RECORD = "stage.json"
STEP_RECORD = "step.json"
KEEP_STEPS = 2

READ_AT_ONCE = 1 << 28
"""Bytes of arrays that are read at the same time; at least one array."""

_ARRAYS = "arrays"
_LONGEST_WRITE = 24 * 3600
"""Seconds that a checkpoint may take to be written."""
_REMEDIES = {
    errno.ENOSPC: ("no space left on the disk", "free some"),
    errno.EDQUOT: ("the quota of the disk is used up", "free some space"),
    errno.EFBIG: ("a file is larger than allowed", "raise the limit (ulimit -f)"),
    errno.EROFS: ("the disk is read-only", "make it writable"),
    errno.EACCES: ("no permission to write", "change that"),
}
_VERSIONS_OF = ("antgmm-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def save_stage(directory: str | Path, tree: Any, record: Mapping[str, Any]) -> None:
    """Saves a finished stage. `directory` does not exist until the stage is completely on disk.

    With `jax.distributed`, all processes must call it with the same arguments; `directory` must be on shared storage.

    Args:
      directory: folder of the stage, `stages/NN-name`; must not exist.
      tree: nested dict of arrays.
      record: JSON-compatible values (config, parent, keep, metrics, seeds, data fingerprint and position); NumPy arrays
        and scalars are converted: arrays up to `packed.LISTED` elements are read as lists, larger ones as arrays. The
        versions of the libraries are added under `versions`.

    Raises:
      AntgmmError: the folder exists or cannot be written; nothing is left on disk.
      TypeError: a leaf is not an array.
    """
    directory = Path(directory)
    _save(directory, tree, record, STAGE_RECORD)()
    processes.barrier(f"{directory} done")


def load_stage(directory: str | Path, axes: Mapping[str, Any] | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Loads a stage.

    Args:
      directory: folder written by `save_stage`.
      axes: tree of tuples of axis names, with a superset of the leaves. The leaves are then loaded straight onto the
        devices, split over the mesh by these names.

    Returns:
      The tree as nested dicts, in the saved dtypes, of JAX arrays or without `axes` of NumPy arrays; and the record
      with `versions`.

    Raises:
      AntgmmError: the stage is absent or incomplete, or a file is truncated or altered.
    """
    directory = Path(directory)
    record, contents = _read(directory, STAGE_RECORD)
    leaves = contents["leaves"]
    flat = _load_arrays(directory, contents, {name: target_at(leaf, axes) for name, leaf in leaves.items()})
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *parents, last = leaf["path"]
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = flat[name]
    return tree, record


def load_record(directory: str | Path) -> dict[str, Any]:
    """Loads the record of a stage without its arrays.

    Raises:
      AntgmmError: the stage is absent, or its record is not JSON.
    """
    return _read(Path(directory), STAGE_RECORD)[0]


def stage_shapes(directory: str | Path) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the names of a stage's arrays, the keys of their paths joined by ".", with their shapes and dtypes.

    Raises:
      AntgmmError: as in `load_record`.
    """
    leaves = _read(Path(directory), STAGE_RECORD)[1]["leaves"]
    return {".".join(leaf["path"]): jax.ShapeDtypeStruct(leaf["shape"], leaf["dtype"]) for leaf in leaves.values()}


def stage_digest(directory: str | Path) -> str:
    """Returns a digest of a stage: of its record, which holds the checksums of its files.

    Raises:
      AntgmmError: as in `load_record`.
    """
    _read(Path(directory), STAGE_RECORD)
    return hashlib.sha256((Path(directory) / STAGE_RECORD).read_bytes()).hexdigest()[:16]


def is_complete(directory: str | Path) -> bool:
    """Whether `directory` contains a complete stage: its record, and all files of the record with their full sizes."""
    directory = Path(directory)
    try:
        files = _read(directory, STAGE_RECORD)[1]["files"]
        return all((directory / name).stat().st_size == size for name, (size, _) in files.items())
    except (AntgmmError, OSError):
        return False


def save_step(directory: str | Path, step: int, tree: Any, record: Mapping[str, Any]) -> Callable[[], None]:
    """Starts saving a step of a running stage in a thread; then removes all but the newest two steps.

    When this returns, the caller may donate or change the arrays. The step exists only once it is completely on disk.

    Args:
      directory: folder for the steps of the stage; created if absent.
      step: number of completed optimizer steps, >= 0.
      tree: any tree of arrays (parameters, optimizer state, PRNG keys).
      record: as in `save_stage`.

    Returns:
      A function that waits until this process's part is on disk. Call it before the next save. It raises AntgmmError
      if the step could not be written; earlier steps are then intact.

    Raises:
      AntgmmError: the step already exists, or its folder cannot be created.
      TypeError: a leaf is not an array.
    """
    directory = Path(directory)

    def remove_old() -> None:
        for old in _steps(directory)[:-KEEP_STEPS]:
            folders.discard(directory / f"{old:08d}")

    return _save(directory / f"{step:08d}", tree, record, STEP_RECORD, remove_old)


def latest_step(directory: str | Path) -> int | None:
    """Returns the newest step saved in `directory`, or None."""
    return max(_steps(Path(directory)), default=None)


def load_step_record(directory: str | Path, step: int) -> dict[str, Any]:
    """Loads the record of a step without its arrays.

    Raises:
      AntgmmError: the step is absent, or its record is not JSON.
    """
    return _read(Path(directory) / f"{step:08d}", STEP_RECORD)[0]


def load_step(directory: str | Path, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
    """Loads a step exactly, into the structure of `like`.

    Args:
      directory: the folder passed to `save_step`.
      step: an existing step.
      like: tree with the saved structure, shapes and dtypes; floating-point leaves may have another floating-point
        dtype, and are restored in the saved one. A `jax.Array` or `jax.ShapeDtypeStruct` leaf is restored as a
        `jax.Array` with the leaf's sharding (default: replicated), a NumPy leaf as a NumPy array, a typed PRNG key as a
        typed PRNG key.

    Returns:
      The tree and the record with `versions`.

    Raises:
      AntgmmError: the step is absent or damaged, or its leaves differ from those of `like`.
    """
    folder = Path(directory) / f"{step:08d}"
    record, contents = _read(folder, STEP_RECORD)
    leaves = {name: as_saved(leaf, contents["leaves"].get(name)) for name, (_, leaf) in named_leaves(like).items()}
    assert_same_leaves(folder, contents["leaves"], {name: describe(leaf) for name, leaf in leaves.items()})
    flat = _load_arrays(folder, contents, leaves)
    return jax.tree.unflatten(jax.tree.structure(like), [flat[name] for name in leaves]), record


def discard_steps(directory: str | Path) -> None:
    """Removes the steps of a stage that has been saved; does nothing if the folder is absent."""
    directory = Path(directory)
    if jax.process_index() == 0 and directory.exists():
        folders.discard(directory)


def _steps(directory: Path) -> list[int]:
    names = (path.parent.name for path in directory.glob(f"[0-9]*/{STEP_RECORD}"))
    # Not copies such as 00000002.bak.
    return sorted(int(name) for name in names if name.isdecimal() and name == f"{int(name):08d}")


def _save(
    target: Path, tree: Any, record: Mapping[str, Any], record_name: str, after: Callable[[], None] = lambda: None
) -> Callable[[], None]:
    """Starts a save in a thread, followed by `after` in the first process; returns a function that waits for it."""
    named = named_leaves(tree)
    # Orbax rejects arrays without elements; they are restored from the table of leaves.
    arrays = {name: leaf for name, (_, leaf) in named.items() if leaf.size}
    leaves = {name: {"path": path, **describe(leaf)} for name, (path, leaf) in named.items()}
    # A copy, because the caller may change the record while the thread is writing.
    text = json.loads(json.dumps({**record, "versions": _versions()}, default=_plain))
    if processes.from_first_process(target.exists):
        raise AntgmmError(f"{target} already exists; remove it to save it again")
    temporary, primary = target.with_name(f".{target.name}.tmp"), processes.is_first()
    with contextlib.ExitStack() as stack, _save_errors(target, temporary):
        stack.enter_context(silent())
        if primary:
            folders.remove_leftovers(target.parent)
            temporary.mkdir(parents=True)
        processes.barrier(f"{target} started")
        with _orbax():
            saved = ocp.save_async(str(temporary.absolute() / _ARRAYS), arrays) if arrays else None
        quiet = stack.pop_all()  # until the threads have ended

    def write() -> None:
        with quiet, _save_errors(target, temporary):
            if saved is not None:
                saved.result()
            if primary:
                contents = {"leaves": leaves, "files": folders.checksums(temporary)}
                (temporary / record_name).write_text(sealed({**text, "contents": contents}))
                folders.publish(temporary, target)
                after()

    executor = ThreadPoolExecutor(1)  # Python waits for its thread before it exits
    written = executor.submit(write)
    executor.shutdown(wait=False)
    return written.result


@contextlib.contextmanager
def _save_errors(target: Path, temporary: Path) -> Iterator[None]:
    """Removes the temporary folder after an error, and reports errors of the disk in one line."""
    try:
        yield
    except Exception as error:
        wait_for_threads()
        if processes.is_first():
            shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError | ValueError):  # TensorStore reports a failed write as ValueError
            raise AntgmmError(f"cannot save {target}: {_reason(error)}; earlier checkpoints are intact") from error
        raise


def _read(directory: Path, record_name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    path, remedy = directory / record_name, f"remove {directory} and run it again"
    if not exists(path):
        raise AntgmmError(f"{directory} does not contain a complete {path.stem}: {path} is missing; run it again")
    record = read_book(path, remedy)
    contents = record.pop("contents", None)
    try:
        record = unpacked(record)
        return record, {"leaves": checked_leaves(contents["leaves"]), "files": _checked_files(contents["files"])}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise AntgmmError(f"{path} has no table of contents: {remedy}") from error


def _checked_files(files: Any) -> dict[str, tuple[int, int]]:
    """The table of files. Raises ValueError or TypeError if it is not one of files in the folder."""
    if outside := [name for name in files if Path(name).is_absolute() or ".." in Path(name).parts]:
        raise ValueError(outside[0])
    return {name: (int(size), int(checksum)) for name, (size, checksum) in files.items()}


def _load_arrays(directory: Path, contents: dict[str, Any], like: dict[str, Any]) -> dict[str, Any]:
    # Once: the processes would read all of it from one server, some minutes longer than others.
    processes.run_on_first(lambda: folders.verify(directory, contents["files"]))
    wanted = {name: target_of(leaf) for name, leaf in like.items()}
    stored = {name: target for name, target in wanted.items() if target.size}
    try:
        with _orbax(largest=max((t.size * t.dtype.itemsize for t in stored.values()), default=0)):
            flat = ocp.load(str(directory.absolute() / _ARRAYS), stored) if stored else {}
    except TimeoutError as error:
        raise AntgmmError(f"cannot read {directory}: {_reason(error)}; run it again") from error
    except (OSError, ValueError) as error:
        raise AntgmmError(f"cannot read {directory}: {_reason(error)}; remove it and run it again") from error
    return {name: flat[name] if target.size else empty(target) for name, target in wanted.items()}


@contextlib.contextmanager
def _orbax(largest: int = 0) -> Iterator[None]:
    """Sets Orbax's use of memory and keeps it quiet.

    Args:
        largest: bytes of the largest array to read.
    """
    context = ocp.Context()
    # zstd makes trained float32 parameters only 8 % smaller. For 20 arrays with 0.9 GB (2026-11-28, AMD EPYC, 2 cores):
    # 9 s and 0.76 GB of memory beyond the arrays to save them with zstd, 1 s and none without.
    context.array_options.saving.use_compression = False
    # From a GPU, Orbax would copy all arrays to pinned memory at once, of which XLA gives 64 GiB a device.
    context.array_options.saving.enable_pinned_host_transfer = False
    # Otherwise the writing threads, and the process, wait for minutes for a folder that a read-only disk refused.
    context.async_options.create_directories_asynchronously = False
    context.async_options.timeout_secs = _LONGEST_WRITE  # otherwise 20 minutes, in which a slow disk takes no 130 GB
    # The same arrays took 1.8 GB to load without a limit. Orbax refuses arrays that are not below it.
    context.memory_options.read_concurrent_bytes = max(READ_AT_ONCE, largest + 1)
    with silent(), context:
        yield


def _reason(error: Exception) -> str:
    for number, (what, remedy) in _REMEDIES.items():
        if getattr(error, "errno", None) == number or os.strerror(number) in str(error):
            return f"{what}; {remedy} and run it again"
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


@functools.cache
def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), **versions_of(*_VERSIONS_OF)}


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return packed(np.asarray(value))
    raise TypeError(f"a record cannot contain a {type(value).__name__}")
