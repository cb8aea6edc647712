"""Runs a study: one run for each arm and seed; runs are resumable, and finished results are reused."""

import itertools
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax

from antgmm_jax.config import LMMConfig
from antgmm_jax.errors import AntgmmError
from antgmm_jax.io.books import read_book, write_book
from antgmm_jax.io.convert import load_hf
from antgmm_jax.io.files import one_line
from distill import fingerprint
from experiments.lab.planning.rates import RequestSize
from experiments.lab.study.arms import Arm, Study, recipe_of
from experiments.lab.study.curve import with_costs, write_curve
from experiments.lab.study.summary import write_results
from experiments.run.files import write_text
from experiments.run.folder import RECIPE, InUse, RunFolder
from experiments.run.host.allocator import return_freed_memory
from experiments.run.host.console import say
from experiments.run.pipeline import Run
from experiments.run.progress.flops import training_flops
from experiments.run.rows.datasets import load_records
from experiments.run.schema import Recipe
from experiments.run.schema.recipe import dump_recipe, load_recipe, load_training
from experiments.run.start import decided_by

RESULT = "result.json"
Result = dict[str, Any]
"""`arm`, `seed`, `exact_match`, `exact_match_hard`, `by_type`, `params`, `sizes`, `steps`, `flops`, `seconds`,
and `of` (a digest of recipe and teacher)."""


def run_study(study: Study, folder: Path, out: Path, *, only: Sequence[str] = ()) -> list[Result]:
    """Runs all unfinished runs, and writes all results after each of them.

    Results in the output file with the same recipe, teacher and files of rows (with the same times, if they are no
    JSON) count as finished, so that a study can be continued without the folder of its runs. Several processes can
    share a study: each skips runs that another one holds.

    Args:
        study: the study.
        folder: folder for the runs `ARM/seed-N` and their common teacher cache.
        out: JSON file for the list of results; a table (.md) and a plot (.svg) are written next to it.
        only: names of the arms to run; empty for all.

    Returns:
        All results so far, including other arms; for a complete curve with compression and speed-up.

    Raises:
        AntgmmError: no such arm, or an error of a run.
    """
    config, params = load_hf(load_recipe(study.recipe, study.changes).teacher.path)
    wanted = {
        (arm.name, seed): fingerprint(params, _inputs(recipe_of(study, arm, seed, config, pretrained=arm.pretrained)))
        for arm in study.arms
        for seed in study.seeds_of(arm)
    }
    del params
    for arm, seed in study.runs(tuple(only)):
        place = folder / arm.name / f"seed-{seed}"
        if any((each["arm"], each["seed"]) == (arm.name, seed) for each in results(wanted, folder, out)):
            continue
        say(f"arm {arm.name}, seed {seed}")
        try:
            result = _run(study, arm, seed, config, folder, place)
        except InUse:
            say(f"arm {arm.name}, seed {seed}: another process has it")
            continue
        write_book(place / RESULT, result | {"of": wanted[arm.name, seed]})
        write_results(results(wanted, folder, out), out)
        # Compiled programs take memory maps, of which Linux gives a process 65 530, and other runs have other shapes.
        jax.clear_caches()
        return_freed_memory()
    finished = results(wanted, folder, out)
    if study.curve and len(finished) == len(study.runs()):
        finished = with_costs(finished, config, RequestSize(study.length, study.answer))
        write_curve(finished, out)
    else:
        write_results(finished, out)
    return finished


def results(wanted: Mapping[tuple[str, int], str], folder: Path, out: Path) -> list[Result]:
    """Collects finished results from the folder of runs and from the output file.

    Args:
        wanted: (arm, seed) -> expected digest of recipe and teacher.
        folder, out: as in `run_study`.

    Returns:
        Results of finished runs, in the order of `wanted`.

    Raises:
        AntgmmError: a file with results is damaged.
    """
    with one_line(lambda: f"{out} is not a list of results", "remove it and run it again"):
        stored = json.loads(out.read_text()) if out.exists() else []
        finished = {(r["arm"], r["seed"]): r for r in stored if r.get("of") == wanted.get((r["arm"], r["seed"]))}
    for arm, seed in wanted:
        place = folder / arm / f"seed-{seed}" / RESULT
        if place.exists() and (result := read_book(place)).get("of") == wanted[arm, seed]:
            finished[arm, seed] = result
    return [finished[key] for key in wanted if key in finished]


def _inputs(recipe: Recipe) -> str:
    """A recipe as JSON without default values, so that new keys do not invalidate old results; and digests of files.

    Generated rows follow from the recipe.
    """
    text = json.dumps(recipe.model_dump(mode="json", exclude_defaults=True), sort_keys=True)
    tables = (recipe.data, recipe.evaluate.data, recipe.hard)
    digests = [load_records(table).digest() for table in tables if table is not None and table.kind != "maad"]
    return " ".join([text, *digests])


def _run(study: Study, arm: Arm, seed: int, config: LMMConfig, folder: Path, place: Path) -> Result:
    before = _pretrained(arm, seed, folder) if arm.pretrained else ""
    recipe = recipe_of(study, arm, seed, config, pretrained=before)
    lend_stages(recipe, folder, place)
    scores = Run(recipe, place, cache=folder / "cache").scores()
    flops = training_flops(config, recipe, length=study.length, answer=study.answer)
    steps = sum(stage.steps for stage in recipe.stages)
    return {"arm": arm.name, "seed": seed, "steps": steps, "flops": flops, **scores}


def lend_stages(recipe: Recipe, folder: Path, place: Path) -> None:
    """Copies the first stages of a new run from a finished run with the same recipe up to there.

    This is possible because stages are deterministic and do not depend on later stages. Existing runs are not changed.

    Args:
        recipe: recipe of the new run.
        folder: folder of the study with the finished runs.
        place: folder of the new run.
    """
    if place.exists():
        return
    sources = sorted(path.parent for path in folder.glob(f"*/seed-*/{RESULT}"))
    common = {source: _common_stages(recipe, source / RECIPE) for source in sources}
    if not any(common.values()):
        return
    source = max(common, key=lambda source: common[source])
    place.parent.mkdir(parents=True, exist_ok=True)
    # Atomic; if another process was faster, its run is kept.
    with tempfile.TemporaryDirectory(dir=folder) as draft, suppress(OSError):
        copy = RunFolder(Path(draft) / place.name)
        for number, stage in enumerate(recipe.stages[: common[source]], 1):
            shutil.copytree(RunFolder(source).stage(number, stage.name), copy.stage(number, stage.name))
        # Without what the other recipe decides: the run adds its own.
        inputs, other = read_book(RunFolder(source).inputs), decided_by(load_recipe(source / RECIPE))
        write_book(copy.inputs, {name: digest for name, digest in inputs.items() if name not in other})
        write_text(copy.path / RECIPE, dump_recipe(recipe))
        copy.path.rename(place)
        say(f"{common[source]} of {len(recipe.stages)} stages are copied from {source.relative_to(folder)}")


def _common_stages(one: Recipe, path: Path) -> int:
    """Number of first stages that two recipes decide alike."""
    try:
        other = load_recipe(path)
        numbers = range(1, 1 + min(len(one.stages), len(other.stages)))
        alike = (decided_by(one.until(number)) == decided_by(other.until(number)) for number in numbers)
        return sum(1 for _ in itertools.takewhile(bool, alike))
    except AntgmmError:  # a recipe of another version, or weights that are gone
        return 0


def _pretrained(arm: Arm, seed: int, folder: Path) -> str:
    """Runs the first phase of the arm's training recipe if necessary; returns its folder."""
    recipe = load_training(arm.pretrained, [f"seed={seed}"])
    recipe = recipe.model_copy(update={"phases": recipe.phases[:1]})
    run, name = RunFolder(folder / arm.name / f"pretrained-{seed}"), recipe.phases[0].name
    run.check(recipe)
    if not run.finished(1, name):
        Run(recipe, run.path).finish_stages()
    return str(run.stage(1, name))
