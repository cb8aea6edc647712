"""The model during a run, and loading it from folders of finished stages."""

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
    """A model during a run: config, float32 parameters, and kept units of the teacher."""

    config: LMMConfig
    params: Params
    keep: dict[str, np.ndarray]


def whole(config: LMMConfig, params: Params) -> Student:
    """Creates a `Student` from a model that is not pruned.

    Args:
        config: model config.
        params: model parameters in any dtype.

    Returns:
        The model in float32, with all units kept.
    """
    return Student(config, float32(config, params), pruning.identity(config))


def teacher_key(params: Params) -> str:
    """Returns a digest of a teacher's parameters; only stages of the same teacher can be recombined."""
    return distill.fingerprint(params, "")[:16]


def cut_record(directory: Path) -> dict[str, Any]:
    """Loads the record of a stage of `antgmm compress`.

    Args:
        directory: folder `stages/NN-name` of a run.

    Returns:
        The record.

    Raises:
        AntgmmError: the stage is not finished, or is a phase of `antgmm train`.
    """
    record = checkpoint.load_record(directory)
    if "keep" not in record:
        raise AntgmmError(f"{directory} is a phase of antgmm train: specify a stage of antgmm compress")
    return record


def keep_of(record: dict[str, Any]) -> dict[str, np.ndarray]:
    """Returns the kept units of a stage's record as arrays."""
    return {axis: pruning.as_kept(kept) for axis, kept in record["keep"].items()}


def load_student(directory: Path) -> Student:
    """Loads the model of a finished stage.

    Args:
        directory: folder of the stage, `stages/NN-name`.

    Returns:
        The student.
    """
    cut_record(directory)
    tree, record = checkpoint.load_stage(directory)
    config = from_dict(record["config"])
    return Student(config, float32(config, tree["params"]), keep_of(record))


def load_after(directory: Path, before: Student) -> Student:
    """Loads the model of a finished stage or phase, which may have saved only the trained parameters.

    Args:
        directory: folder of the stage, `stages/NN-name`.
        before: model before the stage, with the other parameters.

    Returns:
        The model after the stage.
    """
    tree, record = checkpoint.load_stage(directory)
    config = from_dict(record["config"])
    keep = keep_of(record) if "keep" in record else before.keep
    return Student(config, float32(config, {**before.params, **tree["params"]}), keep)
