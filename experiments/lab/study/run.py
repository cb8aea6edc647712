"""Runs a study: one arm and seed after another, each resumable; what is finished is read back."""

import itertools
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from antgmm_jax.config import LMMConfig
from antgmm_jax.errors import AntgmmError
from antgmm_jax.io.convert import load_hf
from distill import fingerprint
from experiments.lab.planning.rates import Asked
from experiments.lab.study.arms import Arm, Study, recipe_of
from experiments.lab.study.curve import with_costs, write_curve
from experiments.lab.study.summary import write_results
from experiments.run.flops import training_flops
from experiments.run.folder import RECIPE, InUse, RunFolder, write_json, write_text
from experiments.run.host.console import say
from experiments.run.pipeline import Run
from experiments.run.schema import Recipe
from experiments.run.schema.recipe import dump_recipe, load_recipe, load_training

RESULT = "result.json"
Result = dict[str, Any]
"""`arm`, `seed`, `exact_match`, `exact_match_hard`, `by_type`, `params`, `sizes`, `steps`, `flops`, `seconds`,
and `of`, a digest of recipe and teacher."""


def run_study(study: Study, folder: Path, out: Path, *, only: Sequence[str] = ()) -> list[Result]:
    """Runs what is not finished yet, and writes all results after each run.

    What the file of results holds of the same recipe and teacher is finished as well, so that a study can be gone on
    with where the runs' folder is not at hand. Started twice, two processes share the runs between them: a run that one
    holds is passed over by the other.

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
    config, params = load_hf(load_recipe(study.recipe, study.changes).teacher.path)
    wanted = {
        (arm.name, seed): fingerprint(params, _told(recipe_of(study, arm, seed, config, pretrained=arm.pretrained)))
        for arm in study.arms
        for seed in study.seeds_of(arm)
    }
    for arm, seed in study.runs(tuple(only)):
        place = folder / arm.name / f"seed-{seed}"
        if any((found["arm"], found["seed"]) == (arm.name, seed) for found in results(wanted, folder, out)):
            continue
        say(f"arm {arm.name}, seed {seed}")
        try:
            result = _run(study, arm, seed, config, folder, place)
        except InUse:
            say(f"arm {arm.name}, seed {seed}: another process has it")
            continue
        write_json(place / RESULT, result | {"of": wanted[arm.name, seed]})
        write_results(results(wanted, folder, out), out)
    found = results(wanted, folder, out)
    if study.curve and len(found) == len(study.runs()):
        found = with_costs(found, config, Asked(study.length, study.answer))
        write_curve(found, out)
    else:
        write_results(found, out)
    return found


def results(wanted: Mapping[tuple[str, int], str], folder: Path, out: Path) -> list[Result]:
    """What is known of a study: what the folder of its runs holds, or else the file of results.

    Args:
        wanted: (arm, seed) -> digest of recipe and teacher that a result must have.
        folder, out: as in `run_study`.

    Returns:
        Results of finished runs, in the order of `wanted`.
    """
    told = json.loads(out.read_text()) if out.exists() else []
    found = {(r["arm"], r["seed"]): r for r in told if r.get("of") == wanted.get((r["arm"], r["seed"]))}
    for arm, seed in wanted:
        place = folder / arm / f"seed-{seed}" / RESULT
        if place.exists() and (told := json.loads(place.read_text())).get("of") == wanted[arm, seed]:
            found[arm, seed] = told
    return [found[key] for key in wanted if key in found]


def _told(recipe: Recipe) -> str:
    """A recipe without what it leaves at its default, so that a new key leaves old results standing."""
    return json.dumps(recipe.model_dump(mode="json", exclude_defaults=True), sort_keys=True)


def _run(study: Study, arm: Arm, seed: int, config: LMMConfig, folder: Path, place: Path) -> Result:
    before = _pretrained(arm, seed, folder) if arm.pretrained else ""
    recipe = recipe_of(study, arm, seed, config, pretrained=before)
    lend_stages(recipe, folder, place)
    found = Run(recipe, place, cache=folder / "cache").scores()
    flops = training_flops(config, recipe, length=study.length, answer=study.answer)
    steps = sum(stage.steps for stage in recipe.stages)
    return {"arm": arm.name, "seed": seed, "steps": steps, "flops": flops, **found}


def lend_stages(recipe: Recipe, folder: Path, place: Path) -> None:
    """Copies the first stages of a run from a finished one that went the same way so far; a run that has begun is left.

    A stage gives the same bits each time: what differs later does not reach it.

    Args:
        recipe: of the run that is to begin.
        folder: of the study, whose finished runs may lend.
        place: of the run.
    """
    if place.exists():
        return
    lenders = sorted(path.parent for path in folder.glob(f"*/seed-*/{RESULT}"))
    alike = {lender: _alike(recipe, lender / RECIPE) for lender in lenders}
    if not any(alike.values()):
        return
    lender = max(alike, key=lambda lender: alike[lender])
    place.parent.mkdir(parents=True, exist_ok=True)
    # Whole or not at all; where another process was first, its run stands.
    with tempfile.TemporaryDirectory(dir=folder) as draft, suppress(OSError):
        copy = RunFolder(Path(draft) / place.name)
        for number, stage in enumerate(recipe.stages[: alike[lender]], 1):
            shutil.copytree(RunFolder(lender).stage(number, stage.name), copy.stage(number, stage.name))
        shutil.copyfile(RunFolder(lender).inputs, copy.inputs)
        write_text(copy.path / RECIPE, dump_recipe(recipe))
        copy.path.rename(place)
        say(f"{alike[lender]} of {len(recipe.stages)} stages are those of {lender.relative_to(folder)}")


def _alike(one: Recipe, path: Path) -> int:
    """How many of its first stages a recipe has in common with a run's; 0 where they differ in what stages read."""
    try:
        other = load_recipe(path)
    except AntgmmError:  # of another version
        return 0
    # The loss and the optimizer at the top are laid under those of each stage.
    own = {"stages", "loss", "optimizer"}
    if one.model_dump(exclude=own) != other.model_dump(exclude=own):
        return 0
    pairs = zip(one.stages, other.stages, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _pretrained(arm: Arm, seed: int, folder: Path) -> str:
    """The first phase of the arm's training recipe, run where it is not finished."""
    recipe = load_training(arm.pretrained, [f"seed={seed}"])
    recipe = recipe.model_copy(update={"phases": recipe.phases[:1]})
    run, name = RunFolder(folder / arm.name / f"pretrained-{seed}"), recipe.phases[0].name
    run.check(recipe)
    if not run.finished(1, name):
        Run(recipe, run.path).finish_stages()
    return str(run.stage(1, name))
