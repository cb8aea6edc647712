"""Recombination: merges the prunings of several runs with the same teacher, and distils the result in one stage."""

import fnmatch
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

import pruning
from antgmm_jax.axes import to_dict
from antgmm_jax.config import LMMConfig
from antgmm_jax.errors import AntgmmError
from antgmm_jax.io import checkpoint
from antgmm_jax.pure import Params
from experiments.run.folder import RECIPE, RunFolder
from experiments.run.pipeline import Run
from experiments.run.progress.watching import NOTHING, Watch
from experiments.run.schema import Recipe
from experiments.run.schema.recipe import change, load_recipe, read_toml
from experiments.run.student import cut_record, keep_of, teacher_key, whole
from pruning.keep import shrunk_config

NAME = "recombined"
"""Name of the folder of the merged model: `stages/00-recombined`."""


class Source(NamedTuple):
    """A finished stage, and patterns of the axes to take from it."""

    stage: Path
    patterns: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parses `STAGE` or `STAGE:PATTERN,PATTERN`, for example `runs/a/stages/01-blocks:*/layers`.

        Args:
            text: value of `--from`.

        Returns:
            The source; without patterns, for all pruned axes.
        """
        stage, colon, patterns = text.rpartition(":")
        return cls(Path(stage if colon else text), tuple(patterns.split(",")) if colon else ("*",))


def recombine(
    path: str | Path,
    run: str | Path,
    sources: Sequence[Source],
    steps: int,
    overrides: Sequence[str] = (),
    watch: Watch = NOTHING,
) -> Run:
    """Prepares a run that prunes the teacher like the merged sources and distils it in one stage.

    Args:
        path: a recipe; its stages are ignored.
        run: folder of the run.
        sources: sources of the axes.
        steps: distillation steps.
        overrides: as in `load_recipe`.
        watch: what to report about the steps.

    Returns:
        The run; an interrupted one can be resumed.

    Raises:
        AntgmmError: a source has another teacher, an axis comes from two sources, a kept layer has no indices on a
            local axis, or the sizes are not legal.
    """
    folder = RunFolder(run)
    merged = folder.stage(0, NAME)
    gone = [source.stage for source in sources if not source.stage.exists()]
    if gone and checkpoint.is_complete(merged):  # as on another machine, with --mirror
        command = f"antgmm compress {folder.path / RECIPE} --run {folder.path}"
        raise AntgmmError(f"{gone[0]} is not there, but its units are merged: continue with `{command}`")
    recipe = folder.pinned(distillation(path, merged, steps, overrides))
    teacher = whole(recipe.teacher.path)
    key = teacher_key(teacher.config, teacher.weights())
    keep, origin = joined(teacher.config, key, sources)
    record = {
        "stage": {"name": NAME, "sizes": {axis: int(keep[axis].shape[-1]) for axis in origin}, "sources": origin},
        "config": to_dict(shrunk_config(teacher.config, keep)),
        "parent": "",
        "teacher": key,
        "keep": keep,
        "seed": recipe.seed,
    }
    with folder.opened(recipe, end="stopped"):  # before its only stage
        folder.bind(teacher=key)
        _save_once(merged, lambda: teacher.cut(keep)[1], record)
    return Run(recipe, run, watch=watch)


def distillation(path: str | Path, parent: Path, steps: int, overrides: Sequence[str] = ()) -> Recipe:
    """Returns a recipe with one stage that distils the model of a parent stage.

    Args:
        path: the recipe.
        parent: folder of the parent stage.
        steps: distillation steps.
        overrides: as in `load_recipe`.

    Returns:
        The recipe.
    """
    stage = f'[{{name = "distil", recover_steps = {steps}}}]'
    changes = [*overrides, f"parent={json.dumps(str(parent))}", f"stage={stage}"]
    raw = read_toml(path, "recipe")
    for each in overrides:
        change(raw, each)
    # The one stage has the losses of the recipe; what only those of its own stages read would be refused.
    loss = raw["loss"] if isinstance(raw.get("loss"), dict) else {}
    if not (loss.get("hidden") or loss.get("vision")):
        changes.append("teacher.states=[]")
    if not (loss.get("soft") or loss.get("rank")):
        changes.append("teacher.top=0")
    return load_recipe(path, changes)


def joined(config: LMMConfig, key: str, sources: Sequence[Source]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Merges the kept units of several stages.

    Args:
        config: config of the teacher.
        key: `teacher_key` of the teacher.
        sources: stages with the axes to take from each.

    Returns:
        Kept units of the teacher, and the stage of each pruned axis.

    Raises:
        AntgmmError: as in `recombine`.
    """
    taken: list[dict[str, np.ndarray]] = []
    origin: dict[str, str] = {}
    for source in sources:
        cuts = _cuts(config, key, source)
        taken.append(cuts)
        # If two sources prune an axis, `merge` raises an error.
        origin |= dict.fromkeys(cuts, str(source.stage))
    try:
        return pruning.merge(*taken, config=config, names=[str(source.stage) for source in sources]), origin
    except AntgmmError as error:
        raise AntgmmError(f"{error}{_origins(str(error), origin)}") from error


def _cuts(config: LMMConfig, key: str, source: Source) -> dict[str, np.ndarray]:
    """Kept units of a stage's pruned axes that match the patterns."""
    record = cut_record(source.stage)
    if record["teacher"] != key:
        raise AntgmmError(
            f"{source.stage} was cut from another teacher than the recipe's: use stages with the same teacher"
        )
    whole, kept = pruning.identity(config), keep_of(record)
    try:
        pruning.check(config, kept)
    except AntgmmError as error:
        raise AntgmmError(f"{source.stage} keeps what the teacher does not have ({error}): choose another") from error
    cut = {axis: keep for axis, keep in kept.items() if not np.array_equal(keep, whole[axis])}
    for pattern in source.patterns:
        if not fnmatch.filter(cut, pattern):
            raise AntgmmError(
                f"{source.stage} prunes no axis that matches {pattern!r}: it prunes {', '.join(sorted(cut))}"
            )
    return {axis: keep for axis, keep in cut.items() if any(fnmatch.fnmatchcase(axis, p) for p in source.patterns)}


def _origins(message: str, origin: Mapping[str, str]) -> str:
    """Text with the stages of the axes in an error message."""
    named = [axis for axis in origin if axis in message and origin[axis] not in message]
    return f" ({', '.join(f'{axis} comes from {origin[axis]}' for axis in named)})" if named else ""


def _save_once(merged: Path, params: Callable[[], Params], record: Mapping[str, Any]) -> None:
    if not checkpoint.is_complete(merged):
        if merged.exists():
            raise AntgmmError(f"{merged} is damaged: remove it and start again")
        checkpoint.save_stage(merged, {"params": params()}, record)
        return
    stored = keep_of(checkpoint.load_record(merged))
    if any(not np.array_equal(stored[axis], index) for axis, index in record["keep"].items()):
        raise AntgmmError(f"{merged} merges other prunings than these: choose another run folder")
