"""Training FLOPs of the stages of a run, from its recipe and model config."""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import NamedTuple

import pruning
from antgmm_jax.config import IMAGE_SIDE, LMMConfig, on_image_side
from antgmm_jax.errors import AntgmmError
from antgmm_jax.families import complete
from antgmm_jax.pure import abstract
from distill.adapters import shapes_with_adapters
from distill.optimizer import muon_flops
from distill.trainable import trainable
from experiments.run.cuts import planned, reads_features, segment_targets
from experiments.run.features import views
from experiments.run.schema import Recipe, Stage, Training, Work
from experiments.run.schema.stage import UNREAD


def pass_flops(config: LMMConfig, rows: int, *, length: int, answer: int, slots: float | None = None) -> dict[str, int]:
    """Returns the FLOPs of a forward pass as in training, with logits of the answers' tokens.

    Args:
        config: model config.
        rows: number of rows.
        length: prompt tokens per row.
        answer: answer tokens per row.
        slots: as in `pruning.forward_flops`.

    Returns:
        tower -> FLOPs.
    """
    size = (length, answer) if config.encoder_decoder else (length + answer, 0)
    return pruning.forward_flops(config, rows, *size, slots=slots, logits=answer)


def step_flops(
    config: LMMConfig,
    stage: Stage,
    *,
    features: bool = False,
    length: int,
    answer: int,
    slots: float | None = None,
) -> int:
    """Returns the FLOPs of a train step: three forward passes through the towers that the stage runs.

    It ignores the teacher, recomputation, and savings by frozen parameters inside a tower.

    Args:
        config: model config.
        stage: stage of a recipe; its losses determine which towers run.
        features: whether cached image features replace the image side.
        length: prompt tokens per sample.
        answer: answer tokens per sample.
        slots: as in `pruning.forward_flops`.

    Returns:
        FLOPs.
    """
    flops = pass_flops(config, stage.optimizer.batch_size, length=length, answer=answer, slots=slots)
    run = set(flops) - ({*IMAGE_SIDE} if features else set())
    if not stage.loss.reads_answers:
        run &= {*IMAGE_SIDE}
    return 3 * sum(flops[tower] for tower in run)


def update_flops(config: LMMConfig, work: Work) -> int:
    """Returns the FLOPs of matrix products with which the optimizer of a stage makes an update.

    On small batches they are a good part of a step: a step of 16 rows of a 35 M student, 0.3 TFLOP, has 0.1 of them.

    Args:
        config: config of the model that is trained.
        work: the stage.
    """
    stage = work.stage
    if stage.optimizer.kind != "muon":
        return 0
    with suppress(AntgmmError):  # a wrong prefix, which the run reports with the name of the stage
        shapes = shapes_with_adapters(abstract(config), stage.adapters)
        return muon_flops(trainable(shapes, work.constant))
    return 0


class StageFlops(NamedTuple):
    """FLOPs of a stage.

    Attributes:
        work: the stage.
        before: model config before the stage.
        after: model config after the stage.
        features: FLOPs of computing cached image features; 0 if the stage uses none, or those of an earlier stage.
        steps: FLOPs of its train steps.
        pictures: whether its steps read pictures, for the student or an online teacher.
        importance: FLOPs of the importance scores for its cuts.
    """

    work: Work
    before: LMMConfig
    after: LMMConfig
    features: int
    steps: int
    pictures: bool
    importance: int


def stage_flops(
    config: LMMConfig, recipe: Recipe | Training, *, length: int, answer: int, slots: float | None = None
) -> Iterator[StageFlops]:
    """Iterates over the FLOPs of all stages of a recipe.

    Args:
        config: config of the initial model.
        recipe: the recipe.
        length: prompt tokens per sample.
        answer: answer tokens per sample.
        slots: as in `pruning.forward_flops`.

    Yields:
        FLOPs of a stage. Image features are computed once per image side, for all views of all rows.
    """
    kept, tables = None, recipe.teacher if isinstance(recipe, Recipe) else None
    rows = recipe.data.samples + (tables.pairs if tables else 0)
    for work in recipe.work:
        stage, segments = work.stage, segment_targets(config, work.stage)
        frozen = work.objective == "answers" and reads_features(config, stage, segments[-1])
        features = frozen and recipe.features == "disk"
        computed = views(stage.shift) * rows if features and kept != stage.shift else 0
        kept, total, scores, current = (stage.shift if features else None), 0, 0, config
        for targets in segments:
            smaller = planned(current, stage, targets)
            if isinstance(recipe, Recipe):
                scored = recipe.calibration_batches * stage.optimizer.batch_size
                scores += importance_flops(current, stage, targets, scored, length=length, answer=answer, slots=slots)
            for steps, model in ((stage.mask_steps, current), (stage.recover_steps, smaller)):
                if work.objective == "facts":
                    each = 3 * image_flops(model, stage.optimizer.batch_size, slots)
                else:
                    lengths = {"length": length, "answer": answer, "slots": slots}
                    each = step_flops(model, stage, features=frozen, **lengths)
                    if frozen and not features:
                        each += image_flops(model, stage.optimizer.batch_size, slots)
                total += steps * each
            current = smaller
        image = image_flops(config, computed, slots) if computed else 0
        taught = tables is not None and tables.mode == "online" and stage.loss.reads_teacher
        yield StageFlops(work, config, current, image, total, taught or not features, scores)
        config = current


def importance_flops(
    config: LMMConfig, stage: Stage, targets: Mapping[str, int], rows: int, **lengths: float | None
) -> int:
    """Returns the FLOPs of the importance scores for a cut: a pass over the rows for each method that reads some.

    Args:
        config: model config before the cut.
        stage: the stage.
        targets: axis -> size after the cut.
        rows: number of rows.
        lengths: `length`, `answer` and `slots`, as in `pass_flops`.
    """
    axes: dict[str, set[str]] = {}
    for axis in complete(config, targets):
        axes.setdefault(stage.method(axis), set()).add(axis)
    flops, total = pass_flops(config, rows, **lengths), 0  # type: ignore[arg-type]
    image, whole = sum(flops[tower] for tower in IMAGE_SIDE), sum(flops.values())
    for method in {*axes} - UNREAD:
        forward = image if all(map(on_image_side, axes[method])) else whole
        total += 3 * whole if method == "taylor" else forward
    return total


def image_flops(config: LMMConfig, rows: int, slots: float | None = None) -> int:
    """Returns the FLOPs of the image side's forward pass over the pictures of some rows.

    Args:
        config: model config.
        rows: number of rows.
        slots: as in `pruning.forward_flops`.
    """
    flops = pruning.forward_flops(config, rows, 1, 1, slots=slots)
    return sum(flops[tower] for tower in IMAGE_SIDE)


def training_flops(config: LMMConfig, recipe: Recipe, *, length: int, answer: int) -> int:
    """Returns the FLOPs of all train steps of a recipe, and of cached image features.

    Args:
        config: config of the initial model.
        recipe: the recipe.
        length: prompt tokens per sample.
        answer: answer tokens per sample.

    Returns:
        FLOPs.
    """
    return sum(stage.features + stage.steps for stage in stage_flops(config, recipe, length=length, answer=answer))
