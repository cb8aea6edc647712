"""The schema of a study: a recipe, and arms that change it. Each arm and seed results in one recipe."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator

import pruning
from antgmm_jax.config import LMMConfig
from antgmm_jax.errors import AntgmmError
from antgmm_jax.families import complete
from experiments.run.cuts import segment_targets
from experiments.run.progress.flops import step_flops, training_flops
from experiments.run.schema import Count, Name, Recipe, Stage, Table, validated
from experiments.run.schema.recipe import load_recipe, read_toml


class Arm(Table):
    """A variant of the study's recipe.

    Attributes:
        name: name in the results.
        changes: changes of the recipe as `key=value`, like `--set`.
        order: names of all stages in the order to run; empty for the recipe's order.
        at_once: whether to prune everything in one stage with the settings of the last one, with recovery steps for the
            same training FLOPs as the study's own stages.
        weights: initial weights of the student, as in `Stage.weights`; other than "kept" only with `at_once`.
        pretrained: recipe of `antgmm train` for the student's shape; its first phase provides the initial weights.
        seeds: seeds of this arm, if different from the study's.
    """

    name: Name
    changes: tuple[str, ...] = ()
    order: tuple[str, ...] = ()
    at_once: bool = False
    weights: str = "kept"
    pretrained: str = ""
    seeds: tuple[int, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.weights != "kept" or self.pretrained) and not self.at_once:
            raise ValueError(f"arm {self.name!r} starts from other weights, which needs at_once = true")
        return self


class Study(Table):
    """A recipe and its arms.

    Attributes:
        recipe: recipe of `antgmm compress`.
        changes: changes of the recipe in every arm.
        seeds: seeds of every arm.
        length, answer: prompt tokens (including image tokens) and answer tokens of a sample, to count FLOPs.
        curve: whether the arms are sizes of one student: then latency is measured, and the knee of the curve is marked.
        arms: `[[arm]]` in the file.
    """

    recipe: str
    changes: tuple[str, ...] = ()
    seeds: tuple[int, ...] = Field(min_length=1)
    length: Count
    answer: Count
    curve: bool = False
    arms: Annotated[tuple[Arm, ...], Field(alias="arm", min_length=1)]

    @model_validator(mode="after")
    def _unique_names(self) -> Self:
        names = [arm.name for arm in self.arms]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"two arms are named {min(twice)!r}")
        return self

    def runs(self, only: tuple[str, ...] = ()) -> list[tuple[Arm, int]]:
        """Returns all (arm, seed) pairs, ordered by seed, so that an interrupted study has comparable results.

        Args:
            only: names of the arms; empty for all.

        Raises:
            AntgmmError: there is no such arm.
        """
        known = [arm.name for arm in self.arms]
        if unknown := [name for name in only if name not in known]:
            raise AntgmmError(f"no arm {unknown[0]!r}: choose one of {', '.join(known)}")
        chosen = [arm for arm in self.arms if not only or arm.name in only]
        turns = max(len(self.seeds_of(arm)) for arm in chosen)
        return [
            (arm, self.seeds_of(arm)[turn]) for turn in range(turns) for arm in chosen if turn < len(self.seeds_of(arm))
        ]

    def seeds_of(self, arm: Arm) -> tuple[int, ...]:
        """Returns the seeds of an arm."""
        return arm.seeds or self.seeds


def load_study(path: str | Path) -> Study:
    """Reads a study.

    Args:
        path: a TOML file.

    Returns:
        The study.

    Raises:
        AntgmmError: the file does not exist, is not TOML, or is invalid.
    """
    return validated(read_toml(path, "study"), Study, str(path))


def recipe_of(study: Study, arm: Arm, seed: int, config: LMMConfig, *, pretrained: str = "") -> Recipe:
    """Returns the recipe of one run of a study.

    Args:
        study: the study.
        arm: one of its arms.
        seed: seed of the run.
        config: config of the teacher.
        pretrained: folder of the pretrained student, for an arm that has one.

    Returns:
        The recipe.

    Raises:
        AntgmmError: an error of `load_recipe`, or illegal sizes.
    """
    recipe = load_recipe(study.recipe, [*study.changes, *arm.changes, f"seed={seed}"])
    if arm.order:
        recipe = recipe.model_copy(update={"stages": _ordered(recipe.stages, arm)})
    if not arm.at_once:
        return recipe
    unchanged = load_recipe(study.recipe, [*study.changes, f"seed={seed}"])
    whole = training_flops(config, unchanged, length=study.length, answer=study.answer)
    shape: dict[str, int] = {}
    importance, current = {}, config
    for stage in recipe.stages:
        # Including tied axes, which may have their own importance method.
        targets = complete(current, segment_targets(current, stage)[-1])
        importance |= {axis: stage.method(axis) for axis in targets}
        shape |= targets
        current = pruning.planned_config(current, targets)
    last, weights = recipe.stages[-1], pretrained or arm.weights
    table = {
        "name": "at-once",
        "sizes": shape,
        "importance": importance,
        "segments": 1,
        "recover_steps": 1,
        "frozen": (),
        "weights": weights,
    }
    # Not validated yet: the warm-up may be longer than this single step.
    once = last.model_copy(update=table)
    mask_step, recovery_step = (
        step_flops(model, once, length=study.length, answer=study.answer) for model in (config, current)
    )
    mask = last.mask_steps if once.keeps_moments else 0
    steps = round((whole - mask * mask_step) / recovery_step)
    table = once.model_dump(mode="json") | {"mask_steps": mask, "recover_steps": steps}
    stage = validated(table, Stage, f"arm {arm.name!r} cannot prune all at once")
    compares = stage.loss.hidden or stage.loss.vision
    teacher = recipe.teacher if compares else recipe.teacher.model_copy(update={"states": ()})
    return recipe.model_copy(update={"stages": (stage,), "teacher": teacher})


def _ordered(stages: Sequence[Stage], arm: Arm) -> tuple[Stage, ...]:
    named = {stage.name: stage for stage in stages}
    if sorted(arm.order) != sorted(named):
        raise AntgmmError(f"arm {arm.name!r}: order must name each stage once: {', '.join(named)}")
    return tuple(named[name] for name in arm.order)
