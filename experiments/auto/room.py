"""Gradient accumulation where the batch of a planned stage does not fit into the memory of a device."""

import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp

from antgmm_jax.config import LMMConfig
from antgmm_jax.parallel import sharding
from antgmm_jax.parallel.memory import device_memory
from antgmm_jax.pure import abstract
from distill.adapters import shapes_with_adapters
from distill.trainable import by_path, trainable
from experiments.auto.schedule import FEWEST, Scale, Tuned, language_stage, small_batch, with_stages
from experiments.auto.sizing import by_side
from experiments.run.batch_size import SHARE, rows_that_fit, saved_bytes
from experiments.run.cuts import planned, reads_features, segment_targets, stored_features
from experiments.run.files import nearest
from experiments.run.narrow import Narrow, held_by, left_by, with_dtypes
from experiments.run.rows.samples import Samples
from experiments.run.schema import Stage, Work
from experiments.run.schema.recipe import recipe_of
from experiments.run.unchanged import unchanged
from pruning.planning import illegal_reason

DISK = 0.8
"""Part of the free disk that image features, or image tokens of the teacher, may take."""
TRAINED, STORED = 12, 8
"""Bytes of a trained parameter beside its value: its gradient and two moments in float32; in a checkpoint, the moments
alone."""
CHECKPOINTS = 3
"""Checkpoints of a stage on disk at most: two are kept while a third one is written."""


def with_room(
    raw: Mapping[str, Any], config: LMMConfig, samples: Samples, narrow: Narrow = MappingProxyType({})
) -> tuple[dict[str, Any], list[str]]:
    """Splits the batches of a recipe's stages where they do not fit into the memory of a device.

    Args:
        raw: tables of the recipe; a stage with `accumulate` of its own or of the recipe keeps it.
        config: config of the initial model.
        samples: training records.
        narrow: parameters of the initial model that are stored in two bytes.

    Returns:
        The tables, and lines about the stages that were changed.
    """
    limit, tables, lines, recipe = device_memory(), [], [], recipe_of(raw, "plan")
    for table, work in zip(raw["stage"], recipe.work, strict=True):
        stage, held, narrow = work.stage, held_by(work, config, narrow), left_by(work, config, narrow)
        parts = micro_batches(config, stage, samples, limit, held, on_disk=recipe.features == "disk")
        config = planned(config, stage, segment_targets(config, stage)[-1])
        if (kept := _state_bytes(config, stage, held)) > limit:
            lines.append(
                f"warning: stage {stage.name} keeps {kept / 1e9:.3g} GB of parameters and moments on each device, which"
                f" has {limit / 1e9:.3g} GB: split them with --mesh fsdp=N, or take a larger device"
            )
        if parts == stage.optimizer.accumulate:
            tables.append(table)
            continue
        tables.append({**table, "optimizer": {**table.get("optimizer", {}), "accumulate": parts}})
        rows = stage.optimizer.batch_size
        lines.append(
            f"memory: stage {stage.name} takes its batches of {rows} in {parts} parts of {rows // parts} (accumulate),"
            f" so that they fit into {limit / 1e9:.3g} GB"
        )
    return {**raw, "stage": tables}, lines


def token_bytes(config: LMMConfig, slots: float) -> float:
    """Returns the bytes of the output of the teacher's bridge in its cache.

    Args:
        config: config of the teacher.
        slots: image slots of all rows.
    """
    return 2 * slots * config.bridge_tokens * config.language.decoder.embed


def checkpoint_bytes(
    tables: Mapping[str, Any], config: LMMConfig, wanted: Mapping[str, int], rows: int, narrow: Narrow
) -> float:
    """Returns the bytes on disk of a run's checkpoints: those of the steps of its largest stage, and all stages.

    Args:
        tables: tables of the recipe without its stages.
        config: config of the initial model.
        wanted: axis -> units of the student.
        rows: number of training records.
        narrow: as in `with_room`.
    """
    steps, results = 0.0, 0.0
    for work, before, after in _planned_stages(tables, config, wanted, rows):
        held = held_by(work, before, narrow)
        result = _state_bytes(after, work.stage, held, beside=0)
        step = _state_bytes(after, work.stage, held, beside=STORED, absent=unchanged(work, before))
        steps, results = max(steps, step), results + result
    return (CHECKPOINTS * steps + results) * sharding.model_parts()


def with_disk(
    tables: Mapping[str, Any],
    config: LMMConfig,
    wanted: Mapping[str, int],
    samples: Samples,
    folder: Path,
    taken: float = 0.0,
) -> list[tuple[dict[str, Any], list[str]]]:
    """Returns the choices of a run between image features on the disk and in every step.

    Args:
        tables: tables of the recipe without its stages; `features` of their own stay.
        config: config of the initial model.
        wanted: axis -> units of the student.
        samples: training records.
        folder: folder of the run, or the nearest one above it that exists.
        taken: bytes of the free disk that the run takes before its image features.

    Returns:
        The tables of each choice, and a line if they are changed; those on the disk come first, if they fit.
    """
    each = _planned_stages(tables, config, wanted, len(samples))
    needed = max((stored_features(before, work.stage, samples) for work, before, _ in each), default=0)
    if "features" in tables or not needed:
        return [(dict(tables), [])]
    free = max(0.0, shutil.disk_usage(nearest(folder)).free - taken)
    computed, remedy = {**tables, "features": "recompute"}, 'every step computes them (features = "recompute")'
    if needed <= DISK * free:
        line = f"image features: {remedy}, which takes less time than those of all rows"
        return [(dict(tables), []), (computed, [line])]
    line = f"disk: image features would take {needed / 1e9:.3g} GB, {free / 1e9:.3g} GB are free: {remedy}"
    return [(computed, [line])]


def _planned_stages(
    tables: Mapping[str, Any], config: LMMConfig, wanted: Mapping[str, int], rows: int
) -> Iterator[tuple[Work, LMMConfig, LMMConfig]]:
    """Yields each stage of a plan with all of its steps, and the configs before and after its cut."""
    for work in recipe_of(with_stages(tables, config, wanted, rows, Scale(1.0, 1.0), Tuned()), "plan").work:
        after = planned(config, work.stage, segment_targets(config, work.stage)[-1])
        yield work, config, after
        config = after


def trial_tables(
    tables: Mapping[str, Any],
    config: LMMConfig,
    wanted: Mapping[str, int],
    samples: Samples,
    narrow: Narrow = MappingProxyType({}),
) -> Mapping[str, Any]:
    """Returns the tables of a recipe without stages with room for the batches of the tuner's trials.

    Args:
        tables: tables of the recipe.
        config: config of the teacher.
        wanted: axis -> units of the student.
        samples: training records.
        narrow: as in `with_room`.
    """
    text = by_side(config, wanted)[1]
    if illegal_reason(config, text):
        return tables
    stage = _trial(config, text, len(samples))
    (roomy,) = with_room({**tables, "stage": [stage]}, config, samples, narrow)[0]["stage"]
    given = {key: value for key, value in roomy["optimizer"].items() if key == "accumulate"}
    return {**tables, "optimizer": {**tables["optimizer"], **given}}


def trial_bytes(
    tables: Mapping[str, Any],
    config: LMMConfig,
    wanted: Mapping[str, int],
    rows: int,
    narrow: Narrow = MappingProxyType({}),
) -> float:
    """Returns the bytes on each device of parameters, gradients and moments of a trial of the tuner.

    Args:
        tables: tables of the recipe.
        config: config of the teacher.
        wanted: axis -> units of the student; those of the language model are legal alone.
        rows: number of training records.
        narrow: as in `with_room`.
    """
    (work,) = recipe_of({**tables, "stage": [_trial(config, by_side(config, wanted)[1], rows)]}, "plan").work
    after = planned(config, work.stage, segment_targets(config, work.stage)[-1])
    return _state_bytes(after, work.stage, held_by(work, config, narrow))


def _trial(config: LMMConfig, text: Mapping[str, int], rows: int) -> dict[str, Any]:
    """A stage like those of the tuner."""
    return {"name": "tune", **language_stage(config, text, Tuned(), FEWEST, small_batch(rows))}


def micro_batches(
    config: LMMConfig, stage: Stage, samples: Samples, limit: float, held: Narrow, *, on_disk: bool = True
) -> int:
    """Returns the fewest parts of a stage's batches of which one fits into the memory of a device.

    Args:
        config: model config before the stage.
        stage: the stage.
        samples: training records.
        limit: bytes of a device.
        held: parameters that the stage holds in two bytes.
        on_disk: whether image features are on disk, so that steps do not compute them.

    Returns:
        The number of equal parts, each of which the devices share evenly; the stage's `accumulate` if it sets one.
    """
    table, targets = stage.optimizer, segment_targets(config, stage)[-1]
    if table.accumulate > 1:
        return table.accumulate
    lengths = samples.lengths
    if on_disk and reads_features(config, stage, targets):
        lengths["slots"] = 0
    if not stage.loss.reads_answers:
        lengths |= {"text": 0, "answer": 0}
    after = planned(config, stage, targets)
    states = saved_bytes(after, **lengths, itemsize=jnp.dtype(table.dtype).itemsize, remat=table.remat)
    # `rows_that_fit` counts the parameters that compute, of which those in their dtype are no copies.
    left = max(1.0, limit - _state_bytes(after, stage, held, without=table.dtype) / SHARE)
    rows = rows_that_fit(after, table.batch_size, **lengths, dtype=table.dtype, states=states, memory=left)
    divisors = (n for n in range(1, table.batch_size + 1) if table.batch_size % n == 0)
    parts = ((n, table.batch_size // n) for n in divisors)
    return next((n for n, part in parts if part <= rows and sharding.padded_batch_size(part) == part), table.accumulate)


def _state_bytes(
    config: LMMConfig,
    stage: Stage,
    held: Narrow,
    *,
    without: str = "",
    beside: int = TRAINED,
    absent: Collection[str] = (),
) -> float:
    """Bytes on each device of a stage's parameters, and of gradients and moments of those that are trained.

    Args:
        config: config of the model that is trained.
        stage: the stage.
        held: parameters that it holds in two bytes.
        without: dtype of parameters that are not counted.
        beside: bytes of a trained parameter beside its value.
        absent: paths of parameters that are not counted.
    """
    shapes = with_dtypes(shapes_with_adapters(abstract(config), stage.adapters), held)
    trained = sum(leaf.size for leaf in jax.tree.leaves(trainable(shapes, stage.constant)))
    counted = [leaf for path, leaf in by_path(shapes)[0].items() if leaf.dtype.name != without and path not in absent]
    return (beside * trained + sum(leaf.size * leaf.dtype.itemsize for leaf in counted)) / sharding.model_parts()
