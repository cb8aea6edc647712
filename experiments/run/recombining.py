"""Recombination: cuts of several runs of one teacher joined, each axis from one of them, and distilled as one stage."""

import fnmatch
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

import pruning
from antgmm_jax.axes import to_dict
from antgmm_jax.config import LMMConfig
from antgmm_jax.errors import AntgmmError
from antgmm_jax.io import checkpoint
from antgmm_jax.io.convert import load_hf
from experiments.run.folder import RunFolder
from experiments.run.pipeline import Run
from experiments.run.schema import Recipe
from experiments.run.schema.recipe import load_recipe
from experiments.run.student import cut_record, keep_of, teacher_key, whole

NAME = "recombined"
"""Names the folder of the joined cut: `stages/00-recombined`."""


class Source(NamedTuple):
    """A finished stage, and patterns of the axes that are taken from it."""

    stage: Path
    patterns: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads `STAGE` or `STAGE:PATTERN,PATTERN`, as in `runs/a/stages/01-blocks:*/layers`.

        Args:
            text: what stands behind `--from`.

        Returns:
            The source; without patterns, of every axis that the stage's model has cut.
        """
        stage, colon, patterns = text.rpartition(":")
        return cls(Path(stage if colon else text), tuple(patterns.split(",")) if colon else ("*",))


def recombine(
    path: str | Path, run: str | Path, sources: Sequence[Source], steps: int, overrides: Sequence[str] = ()
) -> Run:
    """Joins the sources' cuts and cuts the teacher's weights so: what a run with one stage of distillation starts from.

    Args:
        path: a recipe; its teacher, data, loss and optimizer are used, its stages are not.
        run: the run's folder.
        sources: where axes come from.
        steps: distillation steps.
        overrides: as in `load_recipe`.

    Returns:
        The run, which is to be finished; one that was stopped goes on.

    Raises:
        AntgmmError: a source of another teacher, an axis from two sources, a local axis without a row for a chosen
            layer, counts that make no legal model.
    """
    folder = RunFolder(run)
    merged = folder.stage(0, NAME)
    recipe = distillation(path, merged, steps, overrides)
    teacher = whole(*load_hf(recipe.teacher.path))
    key = teacher_key(teacher.params)
    keep, origin = joined(teacher.config, key, sources)
    smaller, cut = pruning.shrink(teacher.config, teacher.params, keep)
    record = {
        "stage": {"name": NAME, "sizes": {axis: int(keep[axis].shape[-1]) for axis in origin}, "sources": origin},
        "config": to_dict(smaller),
        "parent": "",
        "teacher": key,
        "keep": keep,
        "seed": recipe.seed,
    }
    with folder.opened(recipe):
        _save_once(merged, cut, record)
    return Run(recipe, run)


def distillation(path: str | Path, parent: Path, steps: int, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe with one stage that only distils, from a parent.

    Args:
        path: the recipe.
        parent: the stage to start from.
        steps: distillation steps.
        overrides: as in `load_recipe`; laid over the file before.

    Returns:
        The recipe.
    """
    stage = f'[{{name = "distil", recover_steps = {steps}}}]'
    return load_recipe(path, [*overrides, f"parent={json.dumps(str(parent))}", f"stage={stage}"])


def joined(config: LMMConfig, key: str, sources: Sequence[Source]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The keep that several stages' cuts make together.

    Args:
        config: the teacher.
        key: the teacher's `teacher_key`.
        sources: stages, and the axes that are taken from each.

    Returns:
        The keep, in the teacher's coordinates, and the stage that each cut axis comes from.

    Raises:
        AntgmmError: as `recombine`.
    """
    taken: list[dict[str, np.ndarray]] = []
    origin: dict[str, str] = {}
    for source in sources:
        cuts = _cuts(config, key, source)
        taken.append(cuts)
        # Where two sources claim an axis, `merge` refuses and names both.
        origin |= dict.fromkeys(cuts, str(source.stage))
    try:
        return pruning.merge(*taken, config=config, names=[str(source.stage) for source in sources]), origin
    except AntgmmError as error:
        raise AntgmmError(f"{error}{_whence(str(error), origin)}") from error


def _cuts(config: LMMConfig, key: str, source: Source) -> dict[str, np.ndarray]:
    """The axes of a stage's keep that its model has fewer of than the teacher, as far as the patterns fit."""
    record = cut_record(source.stage)
    if record["teacher"] != key:
        raise AntgmmError(f"{source.stage} was cut from another teacher than the recipe's: recombine stages of one")
    whole = pruning.identity(config)
    cut = {axis: keep for axis, keep in keep_of(record).items() if not np.array_equal(keep, whole[axis])}
    for pattern in source.patterns:
        if not fnmatch.filter(cut, pattern):
            raise AntgmmError(f"{source.stage} cuts no axis that fits {pattern!r}: it cuts {', '.join(sorted(cut))}")
    return {axis: keep for axis, keep in cut.items() if any(fnmatch.fnmatchcase(axis, p) for p in source.patterns)}


def _whence(message: str, origin: Mapping[str, str]) -> str:
    """Which stages the axes come from that a refusal is about."""
    named = [axis for axis in origin if axis in message and origin[axis] not in message]
    return f" ({', '.join(f'{axis} comes from {origin[axis]}' for axis in named)})" if named else ""


def _save_once(merged: Path, params: Any, record: Mapping[str, Any]) -> None:
    if not checkpoint.is_complete(merged):
        if merged.exists():
            raise AntgmmError(f"{merged} is damaged: remove it and start again")
        checkpoint.save_stage(merged, {"params": params}, record)
        return
    found = keep_of(checkpoint.load_record(merged))
    if any(not np.array_equal(found[axis], index) for axis, index in record["keep"].items()):
        raise AntgmmError(f"{merged} joins other cuts than these: choose another run folder")
