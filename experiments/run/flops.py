"""Training FLOPs of a run's stages, from its recipe and its model's shape alone."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import pruning
from antgmm_jax.config import IMAGE_SIDE, LMMConfig
from experiments.run.cuts import reads_features, segment_targets
from experiments.run.features import views
from experiments.run.schema import Recipe, Stage, Training, Work


def step_flops(
    config: LMMConfig, stage: Stage, states: Sequence[str], *, features: bool = False, length: int, answer: int
) -> int:
    """FLOPs of a train step: three times those of a forward pass through the towers that the stage runs.

    The teacher's, recomputed ones and what freezing saves inside a tower that is run are left out.

    Args:
        config: the model.
        stage: its losses say which towers are run.
        states: towers whose states the losses may read, `teacher.states` of the recipe.
        features: whether image features stand in for the image side.
        length: prompt tokens a sample.
        answer: answer tokens a sample.

    Returns:
        FLOPs.
    """
    if not config.encoder_decoder:
        length, answer = length + answer, 0
    flops = pruning.forward_flops(config, stage.optimizer.batch_size, length, answer)
    run = set(flops) - ({*IMAGE_SIDE} if features else set())
    if not stage.loss.reads_answers and (not stage.loss.vision or {*IMAGE_SIDE}.issuperset(states)):
        run &= {*IMAGE_SIDE}
    return 3 * sum(flops[tower] for tower in run)


class StageFlops(NamedTuple):
    """What a stage computes.

    Attributes:
        work: the stage.
        before: the model that it finds.
        after: the model that it leaves.
        features: FLOPs of the image features that it reads in the place of pictures; 0 where an earlier stage has
            computed them, or where it reads pictures.
        steps: FLOPs of its train steps.
    """

    work: Work
    before: LMMConfig
    after: LMMConfig
    features: int
    steps: int


def stage_flops(config: LMMConfig, recipe: Recipe | Training, *, length: int, answer: int) -> Iterator[StageFlops]:
    """FLOPs of every stage of a recipe.

    Args:
        config: the model that its first stage finds.
        recipe: the recipe.
        length: prompt tokens a sample.
        answer: answer tokens a sample.

    Yields:
        A stage's; features are computed once for each image side, of every row in all its views.
    """
    kept, tables = None, recipe.teacher if isinstance(recipe, Recipe) else None
    states, rows = (tables.states, recipe.data.samples + tables.pairs) if tables else ((), recipe.data.samples)
    for work in recipe.work:
        stage, segments = work.stage, segment_targets(config, work.stage)
        features = work.objective == "answers" and reads_features(config, stage, segments[-1])
        computed = views(stage.shift) * rows if features and kept != stage.shift else 0
        kept, total, here = (stage.shift if features else None), 0, config
        for targets in segments:
            smaller = pruning.planned_config(here, targets)
            for steps, model in ((stage.mask_steps, here), (stage.recover_steps, smaller)):
                if work.objective == "facts":
                    each = 3 * _image_flops(model, stage.optimizer.batch_size)
                else:
                    each = step_flops(model, stage, states, features=features, length=length, answer=answer)
                total += steps * each
            here = smaller
        yield StageFlops(work, config, here, _image_flops(config, computed) if computed else 0, total)
        config = here


def _image_flops(config: LMMConfig, rows: int) -> int:
    flops = pruning.forward_flops(config, rows, 1, 1)
    return sum(flops[tower] for tower in IMAGE_SIDE)


def training_flops(config: LMMConfig, recipe: Recipe, *, length: int, answer: int) -> int:
    """FLOPs of all train steps of a recipe, and of the image features that stages read instead of pictures.

    Args:
        config: the model that its first stage finds.
        recipe: the recipe.
        length: prompt tokens a sample.
        answer: answer tokens a sample.

    Returns:
        FLOPs.
    """
    return sum(stage.features + stage.steps for stage in stage_flops(config, recipe, length=length, answer=answer))
