"""A model on its way through a run, and the folders of finished stages that it is read back from."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import distill
import pruning
from antgmm_jax.config import LMMConfig
from antgmm_jax.errors import AntgmmError
from antgmm_jax.families import from_dict
from antgmm_jax.io import checkpoint
from antgmm_jax.pure import Params, float32


class Student(NamedTuple):
    """A model on its way: config, parameters (float32) and where its units lie in the model that was cut."""

    config: LMMConfig
    params: Params
    keep: dict[str, np.ndarray]


def whole(config: LMMConfig, params: Params) -> Student:
    """A model that nothing was cut from.

    Args:
        config: the model.
        params: its parameters, in any dtype.

    Returns:
        The same in float32, with all of its units.
    """
    return Student(config, float32(config, params), pruning.identity(config))


def teacher_key(params: Params) -> str:
    """A digest of a teacher's parameters: stages of one teacher can be recombined."""
    return distill.fingerprint(params, "")[:16]


def cut_record(directory: Path) -> dict[str, Any]:
    """The record of a stage that was cut.

    Args:
        directory: `stages/NN-name` of a run of `antgmm compress`.

    Returns:
        The record.

    Raises:
        AntgmmError: no finished stage, or a phase of `antgmm train`.
    """
    record = checkpoint.load_record(directory)
    if "keep" not in record:
        raise AntgmmError(f"{directory} is a phase of antgmm train: give a stage of antgmm compress")
    return record


def keep_of(record: dict[str, Any]) -> dict[str, np.ndarray]:
    """A stage record's keep as arrays."""
    return {axis: pruning.as_kept(kept) for axis, kept in record["keep"].items()}


def load_student(directory: Path) -> Student:
    """The model that a finished stage left.

    Args:
        directory: `stages/NN-name`.

    Returns:
        The student.
    """
    cut_record(directory)
    tree, record = checkpoint.load_stage(directory)
    config = from_dict(record["config"])
    return Student(config, float32(config, tree["params"]), keep_of(record))


def load_after(directory: Path, before: Student) -> Student:
    """The model that a finished stage or phase left, which may have saved only what it trained.

    Args:
        directory: `stages/NN-name`.
        before: the model that it began with.

    Returns:
        The model after it.
    """
    tree, record = checkpoint.load_stage(directory)
    config = from_dict(record["config"])
    keep = keep_of(record) if "keep" in record else before.keep
    return Student(config, float32(config, {**before.params, **tree["params"]}), keep)
