"""Runs a study: one arm and seed after another, each resumable; what is finished is read back."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from antgmm_jax.config import LMMConfig
from antgmm_jax.convert import open_hf
from experiments.bench.rates import Asked
from experiments.console import say
from experiments.folder import InUse, RunFolder, write_json
from experiments.pipeline import Run
from experiments.recipe import load_recipe, load_training
from experiments.study.arms import Arm, Study, recipe_of, training_flops
from experiments.study.curve import with_costs, write_curve
from experiments.study.summary import write_results
from experiments.training import TrainingRun

RESULT = "result.json"
Result = dict[str, Any]
"""`arm`, `seed`, `exact_match`, `exact_match_hard`, `by_type`, `params`, `sizes`, `steps`, `flops`, `seconds`."""


def run_study(study: Study, folder: Path, out: Path, *, only: Sequence[str] = ()) -> list[Result]:
    """Runs what is not finished yet, and writes all results after each run.

    Started twice, two processes share the runs between them: a run that one holds is passed over by the other.

    Args:
        study: the study.
        folder: for its runs, `ARM/seed-N` each, and the teacher cache that they share.
        out: JSON file of the results, a list in the order of the arms; beside it go their table (.md) and plot (.svg).
        only: names of the arms to run; all where it is empty.

    Returns:
        The results so far, those of other arms included; of a curve that is complete, with what each student saves.

    Raises:
        AntgmmError: no such arm, or what a run raises.
    """
    config, _ = open_hf(load_recipe(study.recipe, study.changes).teacher.path)
    for arm, seed in study.runs(tuple(only)):
        place = folder / arm.name / f"seed-{seed}"
        if (place / RESULT).exists():
            continue
        say(f"arm {arm.name}, seed {seed}")
        try:
            result = _run(study, arm, seed, config, folder, place)
        except InUse:
            say(f"arm {arm.name}, seed {seed}: another process has it")
            continue
        write_json(place / RESULT, result)
        write_results(results(study, folder), out)
    found = results(study, folder)
    if study.curve and len(found) == len(study.runs()):
        found = with_costs(found, config, Asked(study.length, study.answer))
        write_curve(found, out)
    else:
        write_results(found, out)
    return found


def results(study: Study, folder: Path) -> list[Result]:
    """The results that a study's folder holds, arm by arm.

    Args:
        study: the study.
        folder: as in `run_study`.

    Returns:
        Those of finished runs.
    """
    places = [folder / arm.name / f"seed-{seed}" / RESULT for arm in study.arms for seed in study.seeds_of(arm)]
    return [json.loads(place.read_text()) for place in places if place.exists()]


def _run(study: Study, arm: Arm, seed: int, config: LMMConfig, folder: Path, place: Path) -> Result:
    before = _pretrained(arm, seed, folder) if arm.pretrained else ""
    recipe = recipe_of(study, arm, seed, config, pretrained=before)
    found = Run(recipe, place, cache=folder / "cache").scores()
    flops = training_flops(config, recipe, length=study.length, answer=study.answer)
    steps = sum(stage.steps for stage in recipe.stages)
    return {"arm": arm.name, "seed": seed, "steps": steps, "flops": flops, **found}


def _pretrained(arm: Arm, seed: int, folder: Path) -> str:
    """The first phase of the arm's training recipe, run where it is not finished."""
    recipe = load_training(arm.pretrained, [f"seed={seed}"])
    run, name = RunFolder(folder / arm.name / f"pretrained-{seed}"), recipe.phases[0].name
    if not run.finished(1, name):
        TrainingRun(recipe.model_copy(update={"phases": recipe.phases[:1]}), run.path)()
    return str(run.stage(1, name))
