"""Checks of a recipe against its model, before anything runs."""

import itertools
from collections.abc import Mapping

import numpy as np

import pruning
from antgmm_jax.axes import sizes
from antgmm_jax.config import LMMConfig, towers
from antgmm_jax.errors import AntgmmError
from antgmm_jax.families import complete
from antgmm_jax.parallel.sharding import local_rows
from antgmm_jax.pure import Params
from distill.adapters import shapes_with_adapters
from distill.trainable import check_paths
from experiments.run.cuts import check_weights, planned, segment_targets
from experiments.run.schema import Recipe, Stage, Work, can_score
from experiments.run.student import Student


def check_sizes(start: Student, stages: tuple[Stage, ...], *, whole: Mapping[str, np.ndarray]) -> None:
    """Checks that all sizes of a recipe are legal and can be scored.

    Args:
        start: initial model; only its config and kept units are read.
        stages: stages of the recipe.
        whole: all units of the teacher, `pruning.identity`.

    Raises:
        AntgmmError: a size is illegal (names the nearest legal ones), initial weights are missing or of another
            shape, the importance method does not support a tied axis, or a width has no principal components (any
            more).
    """
    config = start.config
    by_index = {a for a, kept in start.keep.items() if not (pruning.is_basis(kept) or np.array_equal(kept, whole[a]))}
    for stage in stages:
        try:
            for targets in segment_targets(config, stage):
                by_index |= _pruned_by_index(config, stage, targets, by_index)
                config = planned(config, stage, targets)
            if stage.weights not in ("kept", "random"):
                check_weights(config, stage.weights)
        except AntgmmError as error:
            raise AntgmmError(f"stage {stage.name!r}: {error}") from error


def _pruned_by_index(config: LMMConfig, stage: Stage, targets: Mapping[str, int], before: set[str]) -> set[str]:
    """Checks the importance methods of a segment; returns the axes that it prunes by index."""
    full, present = complete(config, targets), sizes(config)
    cut = [axis for axis in full if full[axis] < present[axis]]
    for axis in cut:
        if not can_score(stage.method(axis), axis):
            how = f"importance {stage.method(axis)!r} cannot score {axis}"
            raise AntgmmError(f"{how}, a tied axis: add a pattern for it")
    projected = sorted(axis for axis in cut if stage.method(axis) == "principal")
    if projected and (stage.segments, stage.mask_steps) != (1, 0):
        how = f'importance "principal" cannot close units of {projected[0]} gradually'
        raise AntgmmError(f"{how}: set segments = 1, mask_steps = 0")
    for axis in projected:
        pruning.check_basis(config, axis)
        if axis in before:
            raise AntgmmError(f"{axis} was pruned by index before: prune it to components first")
    return {*cut} - {*projected}


def check_steps(work: Work, params: Params, rows: int) -> None:
    """Checks that a stage can train.

    Args:
        work: the stage.
        params: parameters before the stage, or their shapes.
        rows: number of training rows, or of rows that they are packed to.

    Raises:
        AntgmmError: there are fewer rows than a batch, nothing is left to train, a path in `frozen` or `rates` matches
            no parameter, or one in `adapters` no linear map.
    """
    stage, table = work.stage, work.stage.optimizer
    try:
        if table.batch_size > rows:
            raise AntgmmError(f"batch_size = {table.batch_size} is more than its {rows} rows: reduce it")
        check_paths(shapes_with_adapters(params, stage.adapters), stage.constant, tuple(table.rates))
    except AntgmmError as error:
        raise AntgmmError(f"{work.title}: {error}") from error


def check_batches(work: Work) -> None:
    """Checks that the devices divide the batches of a stage.

    Args:
        work: the stage.

    Raises:
        AntgmmError: they do not.
    """
    rows = work.stage.optimizer.batch_size
    try:
        local_rows(rows)
    except AntgmmError as error:
        raise AntgmmError(f"{work.title}: batch_size = {rows}: {error}") from error


def check_states(config: LMMConfig, recipe: Recipe) -> None:
    """Checks that `teacher.states` fits the model and the losses of a recipe.

    Args:
        config: config of the teacher.
        recipe: the recipe.

    Raises:
        AntgmmError: an unknown tower, or a loss without a matching tower; lists the possible towers.
    """
    terms = {name: "vision" if tower.tokens == "images" else "hidden" for name, tower in towers(config).items()}
    if wrong := sorted(set(recipe.teacher.states) - set(terms)):
        raise AntgmmError(f"teacher.states contains {wrong[0]!r}: this model has {', '.join(terms)}")
    for stage, term in itertools.product(recipe.stages, ("hidden", "vision")):
        if getattr(stage.loss, term) and not any(terms[tower] == term for tower in recipe.teacher.states):
            fit = " or ".join(tower for tower, kind in terms.items() if kind == term)
            raise AntgmmError(f"stage {stage.name!r}: loss.{term} compares states of {fit}: add one to teacher.states")
