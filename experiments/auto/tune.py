"""A short tuner: which optimizer and learning rate learn the language model's part of the task soonest?"""

import shutil
from collections.abc import Mapping
from functools import partial
from math import inf
from pathlib import Path
from typing import Any, NamedTuple

from antgmm_jax.config import LMMConfig
from antgmm_jax.errors import AntgmmError, memory_error
from antgmm_jax.io.placed import on_devices
from antgmm_jax.parallel.memory import device_memory
from distill import NO_TEACHER, Diverged, State
from experiments.auto.look import Look, spread
from experiments.auto.room import trial_bytes
from experiments.auto.schedule import Machine, Tuned, language_stage, small_batch
from experiments.auto.sizing import by_side
from experiments.run.features import ImageFeatures
from experiments.run.host.console import say
from experiments.run.narrow import narrow_of
from experiments.run.objectives import Shared
from experiments.run.progress.flops import image_flops, step_flops, update_flops
from experiments.run.progress.forecast import CALL, COMPILE, SHARE
from experiments.run.progress.watching import NOTHING, watching
from experiments.run.rows.datasets import encoded
from experiments.run.schema import Recipe, Work
from experiments.run.schema.recipe import recipe_of
from experiments.run.scores.evaluation import token_loss
from experiments.run.stage import StageRun
from pruning import planned_config
from pruning.planning import illegal_reason

KINDS, RATES = ("muon", "adamw"), (1 / 3,)
"""Optimizers that are tried at the usual rate, and the rates, as multiples of it, that the better one is tried at. No
higher rate is tried: it is ahead after 200 steps, and was not after thousands (docs/lab/tasks.md)."""
STEPS, FEWEST, PART = 200, 60, 0.15
"""Steps of a candidate, the fewest that say something, and the largest part of the time for all candidates."""


CLEAR = 0.03
"""Part by which another optimizer or rate must lower the loss; smaller differences are chance after so few steps."""


class Trial(NamedTuple):
    """A candidate with its mean loss per answer token on held-out records."""

    tuned: Tuned
    loss: float

    @property
    def handicapped(self) -> float:
        """The loss, higher by `CLEAR` for what differs from the usual optimizer and for another rate."""
        return self.loss * (1 + CLEAR * ((self.tuned.kind != KINDS[0]) + (self.tuned.rate != 1.0)))


def steps_within(
    seconds: float, tables: Mapping[str, Any], config: LMMConfig, text: Mapping[str, int], machine: Machine
) -> int:
    """Returns the steps that each candidate may take; 0 if there is too little time or data to tell them apart.

    Args:
        seconds: time for all candidates.
        tables: tables of the recipe without stages.
        config: config of the teacher.
        text: axis -> units of the smaller language model.
        machine: what decides the duration.
    """
    (work,) = _recipe(tables, config, text, machine.rows.trained, Tuned(), steps=FEWEST).work
    stage = work.stage
    lengths = {"length": machine.rows.prompt, "answer": machine.rows.answer, "slots": machine.rows.slots}
    smaller = planned_config(config, text)
    flops = step_flops(smaller, stage, features=True, **lengths) + update_flops(smaller, work)
    # Image features of new rows, which all candidates read if they are stored.
    readers = len(KINDS) + len(RATES) if tables.get("features", "disk") == "disk" else 1
    flops += image_flops(config, stage.optimizer.batch_size, machine.rows.slots) / readers
    step = flops / (SHARE * machine.rate) + CALL
    affordable = int((seconds / (len(KINDS) + len(RATES)) - 2 * COMPILE) / step)
    new = machine.rows.trained // stage.optimizer.batch_size  # steps that see no row twice
    steps = min(STEPS, affordable, new)
    return 0 if steps < FEWEST else steps


def tuned(
    tables: Mapping[str, Any], seen: Look, wanted: Mapping[str, int], machine: Machine, seconds: float, place: Path
) -> list[Trial]:
    """Trains the smaller language model on the teacher's image features with some optimizers and rates.

    Args:
        tables: tables of the recipe without stages.
        seen: model and data.
        wanted: axis -> units of the student.
        machine: what decides the duration.
        seconds: time for all candidates.
        place: folder for temporary files, removed at the end.

    Returns:
        Trials, the best first, without those that ran out of memory; none if there is too little time, data or memory,
        or the language model cannot be cut alone.
    """
    config, text = seen.teacher.config, by_side(seen.teacher.config, wanted)[1]
    if illegal_reason(config, text):
        return []
    steps = steps_within(seconds, tables, config, text, machine)
    narrow = narrow_of(seen.teacher.weights())
    if not steps or trial_bytes(tables, config, wanted, len(seen.trained), narrow) > device_memory():
        return []
    try:
        try_out = _Trials(tables, seen, text, steps, place)
        trials = [trial for kind in KINDS if (trial := try_out(Tuned(kind, 1.0)))]
        if trials:
            best = min(trials, key=lambda trial: trial.handicapped).tuned
            trials += [trial for rate in RATES if (trial := try_out(best._replace(rate=rate)))]
    finally:
        shutil.rmtree(place, ignore_errors=True)
    if trials and all(trial.loss == inf for trial in trials):
        raise AntgmmError(
            "the language model diverges with every optimizer and rate that was tried: check that --model holds whole"
            " weights, or train with --set optimizer.dtype=float32"
        )
    return sorted(trials, key=lambda trial: trial.handicapped)


class _Unsaved(StageRun):
    """A stage without checkpoints, which would be gigabytes: a plan that ends early starts again."""

    def _save(self, state: State, place: Any) -> str:
        return ""


class _Trials:
    """Short trainings of the smaller language model, on the teacher's image features of some rows.

    No row is seen twice: on few rows that are repeated, a rate that is too low wins, as it learns them by heart last.
    """

    def __init__(self, tables: Mapping[str, Any], seen: Look, text: Mapping[str, int], steps: int, place: Path):
        self._recipe = partial(_recipe, tables, seen.teacher.config, text, len(seen.trained), steps=steps)
        self._seen, self._place = seen, place
        recipe = self._recipe(Tuned())
        records = spread(seen.trained.records, steps * recipe.stages[0].optimizer.batch_size)
        self._samples = encoded(recipe, records, seen.processor, seen.teacher.config, trained=True)
        self._features = ImageFeatures(self._samples, recipe.seed, place / "features")

    def __call__(self, candidate: Tuned) -> Trial | None:
        """Trains a candidate and measures its loss; None if the memory does not suffice."""
        recipe = self._recipe(candidate)
        (work,) = recipe.work
        title = f"tuning, {candidate.kind} at {work.stage.optimizer.learning_rate:g}"
        try:
            loss = self._loss(recipe, work._replace(title=title))
        except Diverged:
            say(f"{title}: diverged")
            return Trial(candidate, inf)
        except (MemoryError, RuntimeError) as error:
            if memory_error(error) is None:
                raise
            say(f"{title}: not enough memory")
            return None
        say(f"{title}: held-out loss {loss:.3f} after {work.stage.steps} steps")
        return Trial(candidate, loss)

    def _loss(self, recipe: Recipe, work: Work) -> float:
        """Trains the only stage of a recipe; returns the held-out loss."""
        shared = Shared(recipe, NO_TEACHER, dict, self._samples, self._features, lambda stage: None)
        with watching(NOTHING, self._place, recipe) as watcher:
            left = _Unsaved(work, shared, self._place / "steps", watcher.stage(work, None)).run(self._seen.teacher)
        return token_loss(left.config, on_devices(left.config, left.params, "float32"), self._seen.held)


def _recipe(
    tables: Mapping[str, Any], config: LMMConfig, text: Mapping[str, int], rows: int, candidate: Tuned, *, steps: int
) -> Recipe:
    """A recipe with only the language stage and labels, without shifts: they would need features of four views."""
    stage = {**language_stage(config, text, candidate, steps, small_batch(rows)), "name": "tune", "shift": 0}
    # Candidates are compared by the loss of labels, and there is no teacher beside them.
    tables = {**tables, "loss": {"hard": 1.0}, "teacher": {"path": tables["teacher"]["path"]}}
    return recipe_of({**tables, "checkpoint_every": steps, "stage": [stage]}, "plan")
