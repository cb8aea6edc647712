"""What a study says: a recipe, and arms that change it; each arm and seed is a recipe of its own."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator

import pruning
from antgmm_jax.config import LMMConfig
from antgmm_jax.errors import AntgmmError
from antgmm_jax.families import complete
from experiments.run.cuts import segment_targets
from experiments.run.flops import step_flops, training_flops
from experiments.run.schema import Count, Name, Recipe, Stage, Table, validated
from experiments.run.schema.recipe import load_recipe, read_toml


class Arm(Table):
    """One way to compress.

    Attributes:
        name: in the results.
        changes: `key=value` over the recipe, as `--set` takes them.
        order: all stages by name, in the order that they run in; empty: the recipe's.
        at_once: all stages' cuts in one stage, otherwise as the last one; as many recovery steps as take the training
            FLOPs of the study's own stages, whatever the arm changes.
        weights: what the student starts from, as in `Stage.weights`; other than "kept" only `at_once`.
        pretrained: a recipe of `antgmm train` for the student's shape, whose first phase gives its weights instead.
        seeds: this arm's, where they are not the study's.
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
            raise ValueError(
                f"arm {self.name!r} starts from other weights: at_once = true, or each stage draws them anew"
            )
        return self


class Study(Table):
    """Arms of one recipe.

    Attributes:
        recipe: of `antgmm compress`.
        changes: over the recipe in every arm.
        seeds: every arm is run with each.
        length, answer: prompt tokens (the picture's too) and answer tokens of a sample, for counting FLOPs.
        curve: whether the arms are sizes of one student: they are timed beside the teacher, and the knee is named.
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
    def _named_apart(self) -> Self:
        names = [arm.name for arm in self.arms]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"two arms are named {min(twice)!r}")
        return self

    def runs(self, only: tuple[str, ...] = ()) -> list[tuple[Arm, int]]:
        """Every arm and seed, seed by seed, so that a study which is cut short has compared what it has.

        Args:
            only: names of the arms; all where it is empty.

        Raises:
            AntgmmError: there is no such arm.
        """
        known = [arm.name for arm in self.arms]
        if unknown := [name for name in only if name not in known]:
            raise AntgmmError(f"no arm {unknown[0]!r}: choose among {', '.join(known)}")
        chosen = [arm for arm in self.arms if not only or arm.name in only]
        turns = max(len(self.seeds_of(arm)) for arm in chosen)
        return [
            (arm, self.seeds_of(arm)[turn]) for turn in range(turns) for arm in chosen if turn < len(self.seeds_of(arm))
        ]

    def seeds_of(self, arm: Arm) -> tuple[int, ...]:
        """The seeds that an arm is run with."""
        return arm.seeds or self.seeds


def load_study(path: str | Path) -> Study:
    """Reads a study.

    Args:
        path: a TOML file.

    Returns:
        The study.

    Raises:
        AntgmmError: no such file, not TOML, or what is wrong in it.
    """
    return validated(read_toml(path, "study"), Study, str(path))


def recipe_of(study: Study, arm: Arm, seed: int, config: LMMConfig, *, pretrained: str = "") -> Recipe:
    """The recipe of one run of a study.

    Args:
        study: the study.
        arm: one of its arms.
        seed: of the run.
        config: the model that the first stage finds.
        pretrained: folder of the phase that the student starts from, for an arm that has one.

    Returns:
        The recipe.

    Raises:
        AntgmmError: what `load_recipe` refuses, or sizes that are not legal.
    """
    recipe = load_recipe(study.recipe, [*study.changes, *arm.changes, f"seed={seed}"])
    if arm.order:
        recipe = recipe.model_copy(update={"stages": _ordered(recipe.stages, arm)})
    if not arm.at_once:
        return recipe
    own = load_recipe(study.recipe, [*study.changes, f"seed={seed}"])
    whole = training_flops(config, own, length=study.length, answer=study.answer)
    shape: dict[str, int] = {}
    importance, here = {}, config
    for stage in recipe.stages:
        # With the axes that are cut along: a pattern of their own must fit them as well.
        targets = complete(here, segment_targets(here, stage)[-1])
        importance |= {axis: stage.method(axis) for axis in targets}
        shape |= targets
        here = pruning.planned_config(here, targets)
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
    # The warmup may be longer than this one step: checked with the steps that it gets.
    once = last.model_copy(update=table)
    closing, each = (
        step_flops(model, once, recipe.teacher.states, length=study.length, answer=study.answer)
        for model in (config, here)
    )
    mask = last.mask_steps if once.keeps_moments else 0
    steps = round((whole - mask * closing) / each)
    table = once.model_dump(mode="json") | {"mask_steps": mask, "recover_steps": steps}
    stage = validated(table, Stage, f"arm {arm.name!r} cannot cut all at once")
    compares = stage.loss.hidden or stage.loss.vision
    teacher = recipe.teacher if compares else recipe.teacher.model_copy(update={"states": ()})
    return recipe.model_copy(update={"stages": (stage,), "teacher": teacher})


def _ordered(stages: Sequence[Stage], arm: Arm) -> tuple[Stage, ...]:
    named = {stage.name: stage for stage in stages}
    if sorted(arm.order) != sorted(named):
        raise AntgmmError(f"arm {arm.name!r}: order must name each stage once: {', '.join(named)}")
    return tuple(named[name] for name in arm.order)
