"""What a recipe asks of a model that it cannot have: refused before anything runs."""

import itertools
from collections.abc import Mapping

import numpy as np

import pruning
from antgmm_jax.axes import sizes
from antgmm_jax.config import LMMConfig, towers
from antgmm_jax.errors import AntgmmError
from antgmm_jax.families import complete
from antgmm_jax.io import checkpoint
from antgmm_jax.pure import Params
from distill.optimizer import check_paths
from experiments.run.cuts import segment_targets
from experiments.run.schema import Recipe, Stage, Work, can_score
from experiments.run.student import Student


def check_sizes(start: Student, stages: tuple[Stage, ...], *, whole: Mapping[str, np.ndarray]) -> None:
    """Walks through a recipe's cuts before anything runs; an illegal one is refused with the nearest legal ones.

    Args:
        start: the model that the first stage finds; only its config and keep are read.
        stages: the recipe's.
        whole: the teacher's keep.

    Raises:
        AntgmmError: names the stage, the size, and what would be legal; the weights that are not there; an axis that is
            cut along and that its importance cannot score; or a width that has no components, or no longer.
    """
    config = start.config
    by_index = {a for a, kept in start.keep.items() if not (pruning.is_basis(kept) or np.array_equal(kept, whole[a]))}
    for stage in stages:
        try:
            if stage.weights not in ("kept", "random"):
                checkpoint.load_record(stage.weights)
            for targets in segment_targets(config, stage):
                by_index |= _cut_by_index(config, stage, targets, by_index)
                config = pruning.planned_config(config, targets)
        except AntgmmError as error:
            raise AntgmmError(f"stage {stage.name!r}: {error}") from error


def _cut_by_index(config: LMMConfig, stage: Stage, targets: Mapping[str, int], before: set[str]) -> set[str]:
    """The axes that a segment cuts to some of their units; its importance is checked against all that it cuts."""
    full, present = complete(config, targets), sizes(config)
    cut = [axis for axis in full if full[axis] < present[axis]]
    for axis in cut:
        if not can_score(stage.method(axis), axis):
            how = f"importance {stage.method(axis)!r} cannot score {axis}"
            raise AntgmmError(f"{how}, which is cut along: give it a pattern")
    turned = sorted(axis for axis in cut if stage.method(axis) == "principal")
    if turned and (stage.segments, stage.mask_steps) != (1, 0):
        how = f'importance "principal" leaves no units of {turned[0]} to close'
        raise AntgmmError(f"{how}: segments = 1, mask_steps = 0")
    for axis in turned:
        pruning.check_basis(config, axis)
        if axis in before:
            raise AntgmmError(f"{axis} was cut by index before: cut it to components first")
    return {*cut} - {*turned}


def check_steps(work: Work, params: Params, rows: int) -> None:
    """Refuses what a stage could not take a step with, before anything is trained.

    Args:
        work: the stage.
        params: the parameters that it finds, or their description.
        rows: what it draws its batches from; 0 where that is known later (packed rows).

    Raises:
        AntgmmError: fewer rows than a batch has, or a path in `frozen` or `rates` that is none of the model's.
    """
    table = work.stage.optimizer
    try:
        if rows and table.batch_size > rows:
            raise AntgmmError(f"batch_size = {table.batch_size} is more than its {rows} rows: lower it")
        check_paths(params, work.stage.frozen, tuple(table.rates))
    except AntgmmError as error:
        raise AntgmmError(f"{work.title}: {error}") from error


def check_states(config: LMMConfig, recipe: Recipe) -> None:
    """Refuses `teacher.states` that the losses of a recipe cannot compare.

    Args:
        config: the teacher.
        recipe: the recipe.

    Raises:
        AntgmmError: names the towers that can be compared.
    """
    terms = {name: "vision" if tower.tokens == "images" else "hidden" for name, tower in towers(config).items()}
    if wrong := sorted(set(recipe.teacher.states) - set(terms)):
        raise AntgmmError(f"teacher.states names {wrong[0]!r}: this model has states of {', '.join(terms)}")
    for stage, term in itertools.product(recipe.stages, ("hidden", "vision")):
        if getattr(stage.loss, term) and not any(terms[tower] == term for tower in recipe.teacher.states):
            fit = " or ".join(tower for tower, own in terms.items() if own == term)
            raise AntgmmError(f"stage {stage.name!r}: loss.{term} compares states of {fit}: name one in teacher.states")
