"""The model during a run, and loading it from folders of finished stages."""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import numpy as np

import distill
import pruning
from antgmm_jax.axes import nodes, sizes
from antgmm_jax.config import LMMConfig
from antgmm_jax.errors import AntgmmError
from antgmm_jax.families import from_dict
from antgmm_jax.io import checkpoint
from antgmm_jax.io.bounds import check_model_config
from antgmm_jax.io.convert import open_hf
from antgmm_jax.io.files import one_line
from antgmm_jax.io.placed import on_devices, placed
from antgmm_jax.parallel.processes import broadcast_from_first, run_on_first
from antgmm_jax.pure import Params, functional, is_axes
from distill.trainable import by_path

_DIGITS = 16
"""Hexadecimal digits of a teacher's digest."""


class Student(NamedTuple):
    """A model during a run, which occupies no memory until its parameters are loaded.

    Attributes:
        config: model config.
        weights: returns the parameters, possibly still on disk (`Stored`).
        keep: kept units of the teacher.
    """

    config: LMMConfig
    weights: Callable[[], Params]
    keep: dict[str, np.ndarray]

    def load(self, dtype: str = "float32") -> Params:
        """Loads the parameters onto the devices; they are freed when the caller drops them.

        Args:
            dtype: dtype of the result.

        Returns:
            JAX arrays, sharded over the mesh if there is one.
        """
        return on_devices(self.config, self.weights(), dtype)

    def begin(self, frozen: Sequence[str] = (), changed: Collection[str] = ()) -> Params:
        """Loads the parameters for a state of training.

        Args:
            frozen: path prefixes of parameters that stay in two bytes, if they are stored so.
            changed: as in `distill.state_dtypes`.

        Returns:
            JAX arrays with the dtypes of `distill.state_dtypes`.
        """
        params = self.weights()
        return on_devices(self.config, params, distill.state_dtypes(params, frozen, changed))

    def only(self, paths: Collection[str], frozen: Sequence[str] = ()) -> dict[str, jax.Array]:
        """Loads some of the parameters for a state of training; nothing else uses the arrays.

        Args:
            paths: their paths, parts joined by "/".
            frozen: as in `begin`.

        Returns:
            Path -> JAX array, as in `begin`.
        """
        params = self.weights()
        axes, _ = by_path(functional(self.config).axes, is_axes)
        leaves, dtypes = (by_path(tree)[0] for tree in (params, distill.state_dtypes(params, frozen)))
        return {path: placed(leaves[path], axes[path], dtype=dtypes[path]) for path in sorted(paths)}

    def loaded_once(self, dtype: str) -> Self:
        """Returns the same model, which loads its parameters when they are first needed and keeps them.

        Args:
            dtype: dtype of the parameters on the devices; they are freed when the caller drops the model.
        """
        return self._replace(weights=cache(lambda: self.load(dtype)))

    def cut(self, keep: Mapping[str, np.ndarray], frozen: Sequence[str] = ()) -> tuple[LMMConfig, Params]:
        """Loads only the kept units of the model, for a state of training.

        Args:
            keep: kept units of this model, as in `pruning.shrink`.
            frozen: as in `begin`.

        Returns:
            Config and parameters of the smaller model, on the devices.
        """
        # Principal components combine all channels, so they need whole arrays.
        widths = [axis for axis, kept in keep.items() if pruning.is_basis(kept)]
        params = self.begin(frozen, pruning.projected(self.config, widths)) if widths else self.weights()
        config, kept = pruning.shrink(self.config, params, keep)
        return config, on_devices(config, kept, distill.state_dtypes(kept, frozen))


def whole(directory: str | Path) -> Student:
    """Opens a model that is not pruned.

    Args:
        directory: Hugging Face folder, or a name of the Hub.

    Returns:
        The model, with all units kept.

    Raises:
        AntgmmError: as in `open_hf`.
    """
    config, params = open_hf(directory)
    return Student(config, lambda: params, pruning.identity(config))


def teacher_key(config: LMMConfig, params: Params) -> str:
    """Returns a digest of a teacher; only stages of the same teacher can be recombined.

    All processes call it; only the first one reads the files.

    Args:
        config: its config; fields at their defaults do not count, so that new ones change no digest.
        params: its `Stored` parameters.
    """
    made = run_on_first(lambda: distill.fingerprint(params, json.dumps(_stated(config), sort_keys=True))[:_DIGITS])
    sent = np.frombuffer((made or " " * _DIGITS).encode(), np.uint8)
    return broadcast_from_first(sent).tobytes().decode()


def _stated(config: Any) -> dict[str, Any]:
    """Fields of a config that differ from their defaults."""
    values = {item.name: (getattr(config, item.name), item.default) for item in fields(config)}
    return {
        name: _stated(value) if is_dataclass(value) else value
        for name, (value, default) in values.items()
        if value != default
    }


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
    if not isinstance(record["keep"], dict) or not isinstance(record.get("teacher"), str):
        raise AntgmmError(f"{directory} has no record of what it keeps of which teacher: specify another stage")
    return record


def config_of(directory: Path, record: Mapping[str, Any]) -> LMMConfig:
    """Returns the config of a finished stage or phase.

    Args:
        directory: its folder.
        record: its record.

    Raises:
        AntgmmError: the record holds no config, or numbers that no model has.
    """
    place, values = directory / checkpoint.STAGE_RECORD, record.get("config")
    if not isinstance(values, dict):
        raise AntgmmError(f"{place} holds no config: specify another stage")
    check_model_config(place, values)
    with one_line(lambda: f"{place} describes no model", "specify another stage"):
        config = from_dict(values)
        # An axis of size 0 is absent, but no part of a model is without layers.
        if min(sizes(config).values()) < 1 or any(getattr(node.config, "layers", 1) < 1 for node in nodes(config)):
            raise ValueError("an axis has no units")
        return config


def keep_of(record: dict[str, Any]) -> dict[str, np.ndarray]:
    """Returns the kept units of a stage's record as arrays."""
    return {axis: pruning.as_kept(kept) for axis, kept in record["keep"].items()}


def load_student(directory: Path) -> Student:
    """Opens the model of a finished stage.

    Args:
        directory: folder of the stage, `stages/NN-name`.

    Returns:
        The student.
    """
    record = cut_record(directory)
    config = config_of(directory, record)
    return Student(config, lambda: _trained(directory, config), keep_of(record))


def load_after(directory: Path, record: dict[str, Any], before: Student) -> Student:
    """Opens the model of a finished stage or phase, which may have saved only the trained parameters.

    Args:
        directory: folder of the stage, `stages/NN-name`.
        record: its record.
        before: model before the stage, with the other parameters.

    Returns:
        The model after the stage.
    """
    config = config_of(directory, record)
    keep = keep_of(record) if "keep" in record else before.keep
    return Student(config, lambda: completed(_trained(directory, config), before), keep)


def completed(params: Params, before: Student) -> Params:
    """Adds the parameters that a stage did not train.

    Args:
        params: parameters of the stage, by top-level names.
        before: model before the stage.

    Returns:
        All parameters.
    """
    if params.keys() == functional(before.config).axes.keys():
        return params
    return {**before.weights(), **params}


def _trained(directory: Path, config: LMMConfig) -> Params:
    return checkpoint.load_stage(directory, {"params": functional(config).axes})[0]["params"]
