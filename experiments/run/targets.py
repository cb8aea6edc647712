"""Distillation targets of a run: cached or online teachers, and weights of the bridge's tokens."""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

import distill
from antgmm_jax.axes import to_dict
from antgmm_jax.blocks.projector import OUT
from antgmm_jax.config import IMAGE_SIDE, LMMConfig
from antgmm_jax.parallel import preemption
from antgmm_jax.parallel.processes import from_first_process, text_from_first
from antgmm_jax.pure import Params, abstract, functional
from distill import LossConfig, Teacher
from distill.cache import stored_names
from distill.top import name_of
from experiments.run.batch_size import rows_that_fit
from experiments.run.calibration import calibration_batches, scoring_pieces
from experiments.run.cuts import weighs_tokens
from experiments.run.folder import RunFolder, held
from experiments.run.host.console import bar, say, working
from experiments.run.rows.samples import Fits, Samples
from experiments.run.schema import Recipe, Stage
from experiments.run.schema.compress import Teacher as TeacherTable
from experiments.run.student import Student

CACHE_BATCH = 128
IN_MEMORY = 4 << 30  # maximum bytes of a teacher cache to load into memory; larger caches are read from disk


def targets_of(
    recipe: Recipe, teacher: Student, digest: str, samples: Samples, folder: RunFolder, cache: Path
) -> tuple[Teacher, Callable[[], Params]]:
    """Creates the teacher of a recipe with a stage that reads one; builds its cache if necessary.

    Args:
        recipe: the recipe.
        teacher: the teacher.
        digest: its `teacher_key`.
        samples: training records.
        folder: folder of the run, to record the energy.
        cache: folder of caches, which has one folder for each teacher and data.

    Returns:
        The teacher without its parameters, and a function that loads them.
    """
    config, table, dtype = teacher.config, recipe.teacher, recipe.optimizer.dtype
    if table.mode == "online":
        return distill.online(functional(config), {}), lambda: teacher.load(dtype)
    names = target_names(recipe)
    like, pure, stored = next(samples.in_order(1)), functional(config), teacher.weights()
    key = distill.fingerprint({}, f"{digest} {json.dumps(to_dict(config))} {dtype} {samples.fingerprint}")
    place = cache / key[:16]
    shapes = abstract(config, dtype)
    with held(place):
        # A cache that several runs share keeps what the others read, also what was built while this one waited.
        shared = text_from_first(lambda: "\n".join(stored_names(place, key))).split()
        built = tuple(dict.fromkeys((*names, *shared)))
        about = {"samples": len(samples), "totals": samples.totals, "names": built}
        size = distill.cache_size(pure, shapes, like, **about)
        say(f"teacher cache: {', '.join(f'{name} {bytes_ / 1e6:.0f} MB' for name, bytes_ in size.items())}")
        with (
            folder.status.metered("cache"),
            bar("teacher cache", len(samples), safe_point=preemption.leave) as update,
        ):
            if from_first_process(lambda: distill.has_cache(place, key=key, names=names)):
                update(len(samples), "")
            else:
                distill.build_cache(
                    pure,
                    teacher.load(dtype),
                    samples.by_bucket(
                        _fits(config, samples, partial(distill.cache_size, pure, shapes, like, names=built), dtype)
                    ),
                    place,
                    samples=len(samples),
                    like=like,
                    key=key,
                    names=built,
                    size=sum(size.values()),
                    progress=lambda done, total: update(done, ""),
                )
    opened = distill.open_cache(place, key=key, names=names, in_memory=sum(size.values()) <= IN_MEMORY)
    frozen = distill.cached(pure, stored, opened, dtype=dtype)
    return frozen._replace(params={}), lambda: frozen.params


def target_names(recipe: Recipe) -> tuple[str, ...]:
    """Returns the names of the teacher's states that the stages of a recipe read, as in `distill.build_cache`."""
    return names_read(recipe.teacher, [stage.loss for stage in recipe.stages])


def names_read(table: TeacherTable, losses: Sequence[LossConfig]) -> tuple[str, ...]:
    """Returns the names of the teacher's states that losses read, as in `distill.build_cache`.

    Args:
        table: table of the teacher.
        losses: losses of stages; with `table.top`, those that read logits have the same temperature.
    """
    temperatures = [loss.temperature for loss in losses if loss.reads_logits]
    final = [name_of(table.top, temperatures[0]) if table.top else "final"] if temperatures else []
    compares = {True: any(loss.vision for loss in losses), False: any(loss.hidden for loss in losses)}
    states = [f"{tower}/states" for tower in table.states if compares[tower in IMAGE_SIDE]]
    bridge = [OUT] if any(loss.bridge for loss in losses) else []
    return (*final, *states, *bridge)


def _fits(config: LMMConfig, samples: Samples, size: Callable[..., dict[str, int]], dtype: str) -> Fits:
    """Rows of a batch for a cache; `size` returns the bytes of its states for numbers of samples and `totals`."""
    most = min(CACHE_BATCH, len(samples))

    def fits(**lengths: int) -> int:
        states = 2 * sum(size(samples=1, totals=lengths).values())
        return rows_that_fit(config, most, **lengths, dtype=dtype, states=states)

    return fits


def bridge_weights_of(recipe: Recipe, stage: Stage, teacher: Student, samples: Samples) -> np.ndarray | None:
    """Computes the weights of the bridge's output tokens for a stage.

    Args:
        recipe: the recipe.
        stage: one of its stages.
        teacher: the teacher.
        samples: training records.

    Returns:
        Result of `distill.bridge_weights`; None for equal weights.
    """
    table, config = stage.optimizer, teacher.config
    if not weighs_tokens(config, stage):
        return None
    pieces = scoring_pieces(table, config, recipe.calibration_batches, **samples.lengths)
    batches = calibration_batches(samples, **pieces, seed=recipe.seed)
    with working(f"stage {stage.name!r}: sensitivity of the teacher's answers to image tokens"):
        pure = functional(config, table.remat)
        return distill.bridge_weights(pure, teacher.load(table.dtype), batches)
