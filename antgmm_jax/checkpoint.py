"""Stage and step checkpoints: arrays by Orbax, a JSON record beside them; a folder is complete or absent.

Both kinds of checkpoint have one layout::

    DIR/arrays/                     one Orbax checkpoint, a flat dict leaf name -> array
    DIR/stage.json (or step.json)   the caller's record, the versions that wrote it, a table of leaves and of files

A checkpoint is written under a hidden temporary name, flushed to disk and renamed, so that a process killed at any
moment, or a full disk, leaves either the whole folder or none. Nothing is ever pickled.

This is the only file that touches Orbax.
"""

import contextlib
import errno
import importlib.metadata
import json
import logging
import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp

from antgmm_jax import folders, processes, sharding
from antgmm_jax.errors import AntgmmError

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
      tree: nested dict of arrays. Typed PRNG keys are stored as their key data.
      record: what JSON can hold (config, parent, keep, metrics, seeds, data fingerprint and position); NumPy arrays
        and scalars become lists and numbers. The versions of the libraries are added under `versions`.

    Raises:
      AntgmmError: the folder exists, or it cannot be written (a full disk); nothing is left behind.
      TypeError: a leaf is not an array.
    """
    _save(Path(directory), tree, record, STAGE_RECORD)


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
    flat = _load_arrays(directory, contents, {})
    tree: dict[str, Any] = {}
    for name, leaf in contents["leaves"].items():
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


def save_step(directory: str | Path, step: int, tree: Any, record: Mapping[str, Any]) -> None:
    """Saves a step of a running stage and drops all but the newest two.

    Args:
      directory: folder of the running stage's steps; made if absent.
      step: number of optimizer steps taken, >= 0.
      tree: any tree of arrays (parameters, optimizer state, PRNG keys).
      record: as in `save_stage`.

    Raises:
      AntgmmError: the step was saved before, or cannot be written; earlier steps are intact.
      TypeError: a leaf is not an array.
    """
    directory = Path(directory)
    _save(directory / f"{step:08d}", tree, record, STEP_RECORD)
    if jax.process_index() == 0:
        for old in _steps(directory)[:-KEEP_STEPS]:
            folders.discard(directory / f"{old:08d}")


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
    named = _named(like)
    _assert_same_leaves(folder, contents["leaves"], {name: _describe(leaf) for name, (_, leaf) in named.items()})
    flat = _load_arrays(folder, contents, {name: leaf for name, (_, leaf) in named.items()})
    leaves = [_as(leaf, flat[name]) for name, (_, leaf) in named.items()]
    return jax.tree.unflatten(jax.tree.structure(like), leaves), record


def discard_steps(directory: str | Path) -> None:
    """Removes a stage's steps, once the stage itself is saved. An absent folder is fine."""
    directory = Path(directory)
    if jax.process_index() == 0 and directory.exists():
        folders.discard(directory)


def _steps(directory: Path) -> list[int]:
    return sorted(int(path.parent.name) for path in directory.glob(f"[0-9]*/{STEP_RECORD}"))


def _save(target: Path, tree: Any, record: Mapping[str, Any], record_name: str) -> None:
    named = {name: (path, _data(leaf)) for name, (path, leaf) in _named(tree).items()}
    # Orbax refuses arrays of no elements; the table of leaves is enough to make them again.
    arrays = {name: leaf for name, (_, leaf) in named.items() if leaf.size}
    leaves = {name: {"path": path, **_describe(leaf)} for name, (path, leaf) in named.items()}
    if target.exists():
        raise AntgmmError(f"{target} is there already; remove it to save it anew")
    primary = jax.process_index() == 0
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        if primary:
            folders.remove_leftovers(target.parent)
            temporary.mkdir(parents=True)
        processes.wait(f"{target} begun")
        if arrays:
            with _quiet_orbax():
                ocp.save(str(temporary.absolute() / _ARRAYS), arrays)
        if primary:
            contents = {"leaves": leaves, "files": folders.checksums(temporary)}
            text = {**record, "versions": _versions(), "contents": contents}
            (temporary / record_name).write_text(json.dumps(text, default=_plain, indent=1) + "\n")
            folders.publish(temporary, target)
        processes.wait(f"{target} done")
    except (OSError, ValueError) as error:  # TensorStore reports a failed write as ValueError
        raise AntgmmError(f"cannot save {target}: {_reason(error)}; what was saved before is intact") from error
    finally:
        if primary:
            shutil.rmtree(temporary, ignore_errors=True)


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
    empty = {name: np.empty(leaf["shape"], np.dtype(leaf["dtype"])) for name, leaf in contents["leaves"].items()}
    wanted = {name: _target(like.get(name, array)) for name, array in empty.items() if array.size}
    try:
        with _quiet_orbax():
            flat = {**empty, **(ocp.load(str(directory.absolute() / _ARRAYS), wanted) if wanted else {})}
    except (OSError, ValueError) as error:
        raise AntgmmError(f"cannot read {directory}: {_reason(error)}; remove it and run it again") from error
    for name, leaf in flat.items():
        # A key that Orbax lacks comes back as a description of an array, which would only fail much later.
        if not isinstance(leaf, jax.Array | np.ndarray):
            raise AntgmmError(f"{directory} has no array {name!r}; remove it and run it again")
    return flat


def _named(tree: Any) -> dict[str, tuple[list[str], Any]]:
    """Leaf name -> (keys on the way to it, leaf), in the order of `jax.tree.leaves`."""
    named = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        keys = [jax.tree_util.keystr((entry,), simple=True) for entry in path]
        name = ".".join(keys)
        if not isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct):
            raise TypeError(f"leaf {name!r} is a {type(leaf).__name__}, not an array; put it into the record instead")
        if name in named or not keys:
            raise TypeError(f"leaf {name!r} has no name of its own; hold it in a dict under another key")
        named[name] = (keys, leaf)
    return named


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _data(leaf: Any) -> Any:
    if _is_key(leaf):
        return jax.random.key_data(leaf)
    return np.asarray(leaf) if isinstance(leaf, np.generic) else leaf


def _describe(leaf: Any) -> dict[str, Any]:
    aval = jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf
    return {"shape": list(aval.shape), "dtype": np.dtype(aval.dtype).name}


def _target(leaf: Any) -> Any:
    """What Orbax is asked for in place of `leaf`: the same kind of array with the same sharding."""
    if _is_key(leaf):
        aval = jax.eval_shape(jax.random.key_data, leaf)
        return np.empty(aval.shape, aval.dtype)
    if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding or sharding.everywhere())
    return np.asarray(leaf)


def _as(like: Any, array: Any) -> Any:
    if _is_key(like):
        return jax.random.wrap_key_data(array, impl=jax.random.key_impl(like))
    if isinstance(like, jax.Array | jax.ShapeDtypeStruct):
        return array if isinstance(array, jax.Array) else jax.device_put(array, like.sharding)
    return array


def _assert_same_leaves(folder: Path, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Orbax would cast a wrong dtype in silence."""
    for name in sorted(saved.keys() | wanted.keys()):
        found = {key: saved[name][key] for key in ("shape", "dtype")} if name in saved else "absent"
        expected = wanted.get(name, "absent")
        if found != expected:
            raise AntgmmError(
                f"{folder} does not fit this run: {name!r} is {found}, not {expected}; remove it or use its own recipe"
            )


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
