"""What the stages of a run learn from: the teacher's cached or running outputs, and how much its tokens weigh."""

import json
from pathlib import Path

import jax
import numpy as np

import distill
from antgmm_jax.axes import to_dict
from antgmm_jax.blocks.projector import OUT
from antgmm_jax.pure import functional
from distill import Teacher
from distill.teacher import to_dtype
from experiments.run.calibration import calibration_batches
from experiments.run.folder import RunFolder, held
from experiments.run.host.console import bar, say, working
from experiments.run.samples import Samples
from experiments.run.schema import Recipe, Stage
from experiments.run.student import Student

CACHE_BATCH = 128
IN_MEMORY = 4 << 30  # bytes of a teacher cache that each process holds whole; of a larger one it reads rows as it goes


def targets_of(recipe: Recipe, teacher: Student, samples: Samples, folder: RunFolder, cache: Path) -> Teacher:
    """Where the targets of a recipe's stages come from; a cache is computed where it is not there yet.

    Args:
        recipe: the recipe.
        teacher: the model.
        samples: the records that are trained on.
        folder: of the run, where the energy counts.
        cache: for caches, one folder for each teacher and data.

    Returns:
        The teacher as steps see it; none where no stage compares with it.
    """
    config, params, _ = teacher
    table = recipe.teacher
    if not any(stage.loss.reads_teacher for stage in recipe.stages):
        return distill.NO_TEACHER
    if table.mode == "online":
        return distill.online(functional(config), to_dtype(params, jax.numpy.dtype(recipe.optimizer.dtype)))
    final = ("final",) if any(stage.loss.reads_logits for stage in recipe.stages) else ()
    names = (*final, *(f"{tower}/states" for tower in table.states))
    if any(stage.loss.bridge for stage in recipe.stages):
        names = (*names, OUT)
    like = next(samples.in_order(CACHE_BATCH))
    key = distill.fingerprint(params, f"{json.dumps(to_dict(config))} {samples.fingerprint}")
    size = distill.cache_size(functional(config), params, like, samples=len(samples), names=names)
    say(f"teacher cache: {', '.join(f'{name} {bytes_ / 1e6:.0f} MB' for name, bytes_ in size.items())}")
    place = cache / key[:16]
    with (
        held(place),
        folder.metered("cache"),
        bar("teacher cache", len(samples)) as update,
    ):
        distill.build_cache(
            functional(config),
            params,
            samples.by_bucket(CACHE_BATCH),
            place,
            samples=len(samples),
            like=like,
            key=key,
            names=names,
            progress=lambda done, total: update(done, ""),
        )
    opened = distill.open_cache(place, key=key, names=names, in_memory=sum(size.values()) <= IN_MEMORY)
    return distill.cached(functional(config), params, opened)


def bridge_weights_of(recipe: Recipe, stage: Stage, teacher: Student, samples: Samples) -> np.ndarray | None:
    """Weights of the tokens that the teacher's bridge hands on.

    Args:
        recipe: the recipe.
        stage: one of its stages.
        teacher: the model.
        samples: the records that are trained on.

    Returns:
        From `distill.bridge_weights`; None where the stage weighs all alike.
    """
    if stage.loss.bridge_tokens == "alike":
        return None
    pieces = stage.optimizer.pieces(recipe.calibration_batches)
    seen = calibration_batches(samples, **pieces, seed=recipe.seed)
    with working(f"stage {stage.name!r}: how the teacher's answers depend on image tokens"):
        return distill.bridge_weights(functional(teacher.config), teacher.params, seen)
