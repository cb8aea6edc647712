"""What a study says: a recipe, and arms that change it; each arm and seed is a recipe of its own."""

import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

import pruning
from antgmm_jax.config import LMMConfig
from antgmm_jax.errors import AntgmmError
from experiments.recipe import load_recipe
from experiments.schema import Count, Name, Recipe, Stage
from experiments.stage import segment_targets


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Arm(_Table):
    """One way to compress.

    Attributes:
        name: in the results.
        changes: `key=value` over the recipe, as `--set` takes them.
        at_once: all stages' cuts in one stage, with the last one's loss and optimizer; as many recovery steps as take
            the training FLOPs of all stages.
        weights: what the student starts from, as in `Stage.weights`; other than "kept" only `at_once`.
        pretrained: a recipe of `antgmm train` for the student's shape, whose first phase gives its weights instead.
        seeds: this arm's, where they are not the study's.
    """

    name: Name
    changes: tuple[str, ...] = ()
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


class Study(_Table):
    """Arms of one recipe.

    Attributes:
        recipe: of `antgmm compress`.
        changes: over the recipe in every arm.
        seeds: every arm is run with each.
        length, answer: prompt tokens (the picture's too) and answer tokens of a sample, for counting FLOPs.
        arms: `[[arm]]` in the file.
    """

    recipe: str
    changes: tuple[str, ...] = ()
    seeds: tuple[int, ...] = Field(min_length=1)
    length: Count
    answer: Count
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
        turns = max(len(arm.seeds or self.seeds) for arm in chosen)
        return [
            (arm, (arm.seeds or self.seeds)[turn])
            for turn in range(turns)
            for arm in chosen
            if turn < len(arm.seeds or self.seeds)
        ]


def load_study(path: str | Path) -> Study:
    """Reads a study.

    Args:
        path: a TOML file.

    Returns:
        The study.

    Raises:
        AntgmmError: no such file, not TOML, or what is wrong in it.
    """
    try:
        return Study.model_validate_json(json.dumps(tomllib.loads(Path(path).read_text(encoding="utf-8"))))
    except OSError as error:
        raise AntgmmError(f"cannot read the study {path}: {error.strerror}") from None
    except ValidationError as error:
        faults = (f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
        raise AntgmmError(f"{path}: {'; '.join(faults)}") from None
    except ValueError as error:
        raise AntgmmError(f"{path} is not TOML: {error}") from None


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
    if not arm.at_once:
        return recipe
    whole = training_flops(config, recipe.stages, length=study.length, answer=study.answer)
    shape: dict[str, int] = {}
    importance, here = {}, config
    for stage in recipe.stages:
        targets = segment_targets(here, stage)[-1]
        importance |= {axis: stage.method(axis) for axis in targets}
        shape |= targets
        here = pruning.planned_config(here, targets)
    last, weights = recipe.stages[-1], pretrained or arm.weights
    mask = last.mask_steps if weights == "kept" else 0
    closing, each = (
        step_flops(model, last.optimizer.batch_size, length=study.length, answer=study.answer)
        for model in (config, here)
    )
    table = {
        "name": "at-once",
        "sizes": shape,
        "importance": importance,
        "segments": 1,
        "mask_steps": mask,
        "recover_steps": round((whole - mask * closing) / each),
        "weights": weights,
    }
    stage = Stage.model_validate({**last.model_dump(), **table})
    return recipe.model_copy(update={"stages": (stage,)})


def step_flops(config: LMMConfig, batch: int, *, length: int, answer: int) -> int:
    """FLOPs of a train step: three times those of a forward pass, teacher's and recomputed ones left out.

    Args:
        config: the model.
        batch: samples.
        length: prompt tokens a sample.
        answer: answer tokens a sample.

    Returns:
        FLOPs.
    """
    if config.language.encoder is None:
        length, answer = length + answer, 0
    return 3 * sum(pruning.forward_flops(config, batch, length, answer).values())


def training_flops(config: LMMConfig, stages: Sequence[Stage], *, length: int, answer: int) -> int:
    """FLOPs of all train steps of some stages.

    Args:
        config: the model that the first stage finds.
        stages: of a recipe.
        length: prompt tokens a sample.
        answer: answer tokens a sample.

    Returns:
        FLOPs.
    """
    total = 0
    for stage in stages:
        for targets in segment_targets(config, stage):
            smaller = pruning.planned_config(config, targets)
            for steps, model in ((stage.mask_steps, config), (stage.recover_steps, smaller)):
                total += steps * step_flops(model, stage.optimizer.batch_size, length=length, answer=answer)
            config = smaller
    return total
