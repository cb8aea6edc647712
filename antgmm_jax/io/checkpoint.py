"""Stage and step checkpoints: arrays by Orbax, a JSON record beside them; a folder is complete or absent.

Both kinds of checkpoint have one layout::

    DIR/arrays/                     one Orbax checkpoint, a flat dict leaf name -> array
    DIR/stage.json (or step.json)   the caller's record, the versions that wrote it, a table of leaves and of files

A checkpoint is written under a hidden temporary name, flushed to disk and renamed, so that a process killed at any
moment, or a full disk, leaves either the whole folder or none. Nothing is ever pickled.

This is the only file that touches Orbax.
"""

# Orbax 0.12.8 writes and reads the arrays. The record, the commit and the retention of steps are not left to its
# `training.Checkpointer`, which takes as long (150 arrays, 120 MB: 0.36 s, ours with checksums 0.48 s; 8 MB: 0.15 s
# both) and keeps less of what a checkpoint promises here, measured on 2026-11-28 (AMD EPYC, Linux, Python 3.11):
# * 12 times killed while it saved with `LatestN(2)`, it listed a step that was half removed once: it deletes in place.
# * A byte changed in the middle of a data file loads as other numbers, without an error: its zstd has no checksum.
# * `_CHECKPOINT_METADATA` cut in half or removed loads as an empty record, without an error.
# * Neither the metadata files nor the final rename are flushed to disk (strace: every fsync is TensorStore's).

import contextlib
import errno
import importlib.metadata
import json
import logging
import os
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp

from antgmm_jax.errors import AntgmmError
from antgmm_jax.io import folders
from antgmm_jax.io.leaves import assert_same_leaves, describe, empty, named_leaves, target_of
from antgmm_jax.parallel import processes

STAGE_RECORD = "stage.json"
STEP_RECORD = "step.json"
KEEP_STEPS = 2

_ARRAYS = "arrays"
_VERSIONS_OF = ("antgmm-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def save_stage(directory: str | Path, tree: Any, record: Mapping[str, Any]) -> None:
    """Saves a finished stage; when this returns it is on disk, until then `directory` does not exist.

    Under `jax.distributed` every process calls it with the same arguments and a folder that all of them see.

    Args:
      directory: folder of the stage, `stages/NN-name`; must not exist.
      tree: nested dict of arrays.
      record: what JSON can hold (config, parent, keep, metrics, seeds, data fingerprint and position); NumPy arrays
        and scalars become lists and numbers. The versions of the libraries are added under `versions`.

    Raises:
      AntgmmError: the folder exists, or it cannot be written (a full disk); nothing is left behind.
      TypeError: a leaf is not an array.
    """
    directory = Path(directory)
    _save(directory, tree, record, STAGE_RECORD)()
    processes.wait(f"{directory} done")


def load_stage(directory: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads a stage back.

    Args:
      directory: folder that `save_stage` wrote.

    Returns:
      The tree as nested dicts of NumPy arrays (bfloat16 included), and the record with `versions`.

    Raises:
      AntgmmError: the stage is absent or incomplete, or a file of it is truncated or altered.
    """
    directory = Path(directory)
    record, contents = _read(directory, STAGE_RECORD)
    leaves = contents["leaves"]
    flat = _load_arrays(directory, contents, {name: np.empty(of["shape"], of["dtype"]) for name, of in leaves.items()})
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *parents, last = leaf["path"]
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = flat[name]
    return tree, record


def load_record(directory: str | Path) -> dict[str, Any]:
    """Reads the record of a stage without its arrays.

    Raises:
      AntgmmError: the stage is absent, or its record is not JSON.
    """
    return _read(Path(directory), STAGE_RECORD)[0]


def is_complete(directory: str | Path) -> bool:
    """Whether `directory` holds a whole stage: its record, and every file the record lists at its full size."""
    directory = Path(directory)
    try:
        files = _read(directory, STAGE_RECORD)[1]["files"]
        return all((directory / name).stat().st_size == size for name, (size, _) in files.items())
    except (AntgmmError, OSError):
        return False


def save_step(directory: str | Path, step: int, tree: Any, record: Mapping[str, Any]) -> Callable[[], None]:
    """Begins to save a step of a running stage, and drops all but the newest two once it is saved.

    When this returns the arrays are off the devices, or held so that a step which takes them over works on others; they
    are written in a thread while training goes on. Until they are, the step does not exist.

    Args:
      directory: folder of the running stage's steps; made if absent.
      step: number of optimizer steps taken, >= 0.
      tree: any tree of arrays (parameters, optimizer state, PRNG keys).
      record: as in `save_stage`.

    Returns:
      A function that waits until this process's part is on disk. It is to be called before the next save, and raises
      the AntgmmError of a step that could not be written; earlier steps are then intact.

    Raises:
      AntgmmError: the step was saved before, or cannot be begun.
      TypeError: a leaf is not an array.
    """
    directory = Path(directory)

    def drop() -> None:
        for old in _steps(directory)[:-KEEP_STEPS]:
            folders.discard(directory / f"{old:08d}")

    return _save(directory / f"{step:08d}", tree, record, STEP_RECORD, drop)


def latest_step(directory: str | Path) -> int | None:
    """The newest step saved under `directory`; None when there is none."""
    return max(_steps(Path(directory)), default=None)


def load_step_record(directory: str | Path, step: int) -> dict[str, Any]:
    """Reads the record of a step without its arrays: what their shapes are may stand in it.

    Raises:
      AntgmmError: the step is absent, or its record is not JSON.
    """
    return _read(Path(directory) / f"{step:08d}", STEP_RECORD)[0]


def load_step(directory: str | Path, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
    """Reads a step back into the structure of `like`, bit for bit.

    Args:
      directory: folder that `save_step` was given.
      step: a step that stands there.
      like: tree with the structure, shapes and dtypes that were saved. A `jax.Array` or `jax.ShapeDtypeStruct` leaf
        is restored as a `jax.Array` with the leaf's sharding (without one, whole on every device), a NumPy leaf as a
        NumPy array, a typed PRNG key as one.

    Returns:
      The tree and the record with `versions`.

    Raises:
      AntgmmError: the step is absent or damaged, or does not have the leaves of `like`.
    """
    folder = Path(directory) / f"{step:08d}"
    record, contents = _read(folder, STEP_RECORD)
    leaves = {name: leaf for name, (_, leaf) in named_leaves(like).items()}
    assert_same_leaves(folder, contents["leaves"], {name: describe(leaf) for name, leaf in leaves.items()})
    flat = _load_arrays(folder, contents, leaves)
    return jax.tree.unflatten(jax.tree.structure(like), [flat[name] for name in leaves]), record


def discard_steps(directory: str | Path) -> None:
    """Removes a stage's steps, once the stage itself is saved. An absent folder is fine."""
    directory = Path(directory)
    if jax.process_index() == 0 and directory.exists():
        folders.discard(directory)


def _steps(directory: Path) -> list[int]:
    return sorted(int(path.parent.name) for path in directory.glob(f"[0-9]*/{STEP_RECORD}"))


def _save(
    target: Path, tree: Any, record: Mapping[str, Any], record_name: str, then: Callable[[], None] = lambda: None
) -> Callable[[], None]:
    """Begins a save that ends in a thread, with `then` in the first process; gives a function that waits for it."""
    named = named_leaves(tree)
    # Orbax refuses arrays of no elements; the table of leaves is enough to make them again.
    arrays = {name: leaf for name, (_, leaf) in named.items() if leaf.size}
    leaves = {name: {"path": path, **describe(leaf)} for name, (path, leaf) in named.items()}
    # As it is now: the caller goes on and may add to it.
    text = json.loads(json.dumps({**record, "versions": _versions()}, default=_plain))
    if target.exists():
        raise AntgmmError(f"{target} is there already; remove it to save it anew")
    temporary, primary = target.with_name(f".{target.name}.tmp"), processes.first()
    with _told(target, temporary):
        if primary:
            folders.remove_leftovers(target.parent)
            temporary.mkdir(parents=True)
        processes.wait(f"{target} begun")
        with _quiet_orbax():
            saved = ocp.save_async(str(temporary.absolute() / _ARRAYS), arrays) if arrays else None

    def write() -> None:
        with _told(target, temporary), _quiet_orbax():
            if saved is not None:
                saved.result()
            if primary:
                contents = {"leaves": leaves, "files": folders.checksums(temporary)}
                (temporary / record_name).write_text(json.dumps({**text, "contents": contents}, indent=1) + "\n")
                folders.publish(temporary, target)
                then()

    executor = ThreadPoolExecutor(1)  # Python waits for its thread before it ends
    written = executor.submit(write)
    executor.shutdown(wait=False)
    return written.result


@contextlib.contextmanager
def _told(target: Path, temporary: Path) -> Iterator[None]:
    """What a disk refuses in one line, with nothing left of it."""
    try:
        yield
    except Exception as error:
        if processes.first():
            shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError | ValueError):  # TensorStore reports a failed write as ValueError
            raise AntgmmError(f"cannot save {target}: {_reason(error)}; what was saved before is intact") from error
        raise


def _read(directory: Path, record_name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    path = directory / record_name
    try:
        record = json.loads(path.read_text())
        contents = record.pop("contents")
    except (FileNotFoundError, NotADirectoryError):
        raise AntgmmError(f"{directory} holds no saved {path.stem}: {path} is missing; run it again") from None
    except (ValueError, KeyError, AttributeError):
        raise AntgmmError(f"{path} is not a whole record; remove {directory} and run it again") from None
    return record, contents


def _load_arrays(directory: Path, contents: dict[str, Any], like: dict[str, Any]) -> dict[str, Any]:
    folders.verify(directory, contents["files"])
    wanted = {name: target_of(leaf) for name, leaf in like.items()}
    stored = {name: target for name, target in wanted.items() if target.size}
    try:
        with _quiet_orbax():
            flat = ocp.load(str(directory.absolute() / _ARRAYS), stored) if stored else {}
    except (OSError, ValueError) as error:
        raise AntgmmError(f"cannot read {directory}: {_reason(error)}; remove it and run it again") from error
    return {name: flat[name] if target.size else empty(target) for name, target in wanted.items()}


@contextlib.contextmanager
def _quiet_orbax() -> Iterator[None]:
    """On failure Orbax logs a traceback per thread; the caller raises one line instead."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _reason(error: Exception) -> str:
    if getattr(error, "errno", None) == errno.ENOSPC or os.strerror(errno.ENOSPC) in str(error):
        return "no space left on the disk, free some and run it again"
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _VERSIONS_OF:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return np.asarray(value).tolist()
    raise TypeError(f"a record cannot hold a {type(value).__name__}")
