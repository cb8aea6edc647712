"""Commands for runs: demo, train, compress, recombine and report."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from antgmm_jax.errors import AntgmmError
from antgmm_jax.extras import require
from antgmm_jax.io.books import read_book
from experiments.commands import goals
from experiments.commands.output import (
    Coordinator,
    Json,
    Log,
    Mesh,
    Mirror,
    Process,
    Processes,
    Profile,
    Push,
    RunDir,
    Set,
    check_push,
    emit,
    upload,
)
from experiments.commands.starting import Machine, Options, started, state_of
from experiments.run.host.console import count, say, table

if TYPE_CHECKING:
    from experiments.run import schema

_EXPERIMENTS = Path(__file__).resolve().parent.parent
DEMO = _EXPERIMENTS / "recipes" / "demo.toml"
TEACHER = _EXPERIMENTS / "teachers" / "maad-m"
_NEEDED = ("energy", "eval", "report")
"""Extras that every run needs; it checks for them before it starts."""
Reported = Annotated[bool, typer.Option("--report/--no-report", help="Measure a report; later: antgmm report RUN.")]
Recipe = Annotated[Path, typer.Argument(metavar="RECIPE", help="A TOML file.")]


def demo(
    run: RunDir = Path("runs/demo"),
    changes: Set = None,
    as_json: Json = False,
    mesh: Mesh = "",
    coordinator: Coordinator = "",
    processes: Processes = 1,
    process: Process = 0,
    mirror: Mirror = "",
    logs: Log = None,
    profile: Profile = "",
) -> None:
    """Compress the packaged teacher with the packaged recipe: prune and distil stage by stage, export, report."""
    _compress(
        DEMO,
        run,
        packaged(changes),
        Options(Machine(mesh, coordinator, processes, process), mirror, logs, profile),
        as_json,
    )


def packaged(changes: list[str] | None) -> list[str]:
    """Returns changes of the packaged recipe: the absolute path of its teacher, then the user's changes."""
    return [f"teacher.path={json.dumps(str(TEACHER))}", *(changes or [])]


def compress(
    recipe: goals.Recipe = None,
    model: goals.Model = "",
    data: goals.Rows = "",
    test: goals.Tested = "",
    smaller: goals.Smaller = "",
    params: goals.Parameters = 0,
    latency_ms: goals.Latency = 0.0,
    minutes: goals.Minutes = 0.0,
    plan_only: goals.PlanOnly = False,
    run: Annotated[
        Path | None,
        typer.Option(
            "--run", metavar="DIR", help="Folder of the run, by default in runs/; an existing run is resumed."
        ),
    ] = None,
    changes: Set = None,
    push: Push = "",
    as_report: Reported = True,
    as_json: Json = False,
    mesh: Mesh = "",
    coordinator: Coordinator = "",
    processes: Processes = 1,
    process: Process = 0,
    mirror: Mirror = "",
    logs: Log = None,
    profile: Profile = "",
) -> None:
    """Prune and distil a trained model, stage by stage; export it and check the export.

    With RECIPE as it says. Without, from --model, --data and a budget (--smaller, --params or --latency-ms): measures
    model and data, writes a recipe next to the folder of the run, and runs it.
    """
    options = Options(Machine(mesh, coordinator, processes, process), mirror, logs, profile)
    wish = goals.Wish(model, data, test, smaller, params, latency_ms, minutes)
    goals.check(recipe, wish, plan_only=plan_only, processes=processes)
    folder = run or goals.run_of(recipe, wish)
    path = recipe or _planned(wish, folder, changes or [], options.machine)
    if not plan_only:
        _compress(path, folder, changes or [], options, as_json, push, as_report=as_report)


def _planned(wish: goals.Wish, run: Path, changes: list[str], machine: Machine) -> Path:
    """The recipe of a wish, written next to the folder of its run."""
    require(*_NEEDED, "torch")
    say(f"plan: compressing {wish.model} with {wish.data}")
    goal = wish.goal(changes)
    from experiments.auto.plan import planned
    from experiments.run.host.meshes import devices

    with devices(*machine):
        return planned(goal, run.with_name(f"{run.name}.toml"))


def _compress(
    path: Path,
    run: Path,
    changes: list[str],
    options: Options,
    as_json: bool,
    push: str = "",
    *,
    as_report: bool = True,
) -> None:
    require(*_NEEDED, "torch")
    say(f"compressing by {path} in {run}")
    check_push(push)
    from experiments.run.schema.recipe import load_recipe

    recipe = load_recipe(path, changes)
    with started(run, options) as watch:
        from experiments.report.write import finish
        from experiments.run.pipeline import Run

        figures = finish(Run(recipe, run, watch=watch), report=as_report)
        _advise(recipe, run)
        upload(run / "export", push)
    if as_report:
        _print_comparison(figures, run, as_json)
    else:
        _print_result({"export": str(run / "export")}, as_json, f"model: {run / 'export'}; report: antgmm report {run}")


def train(
    recipe: Recipe,
    run: RunDir,
    changes: Set = None,
    push: Push = "",
    as_json: Json = False,
    mesh: Mesh = "",
    coordinator: Coordinator = "",
    processes: Processes = 1,
    process: Process = 0,
    mirror: Mirror = "",
    logs: Log = None,
    profile: Profile = "",
) -> None:
    """Train a teacher by a recipe, from random parameters or from a checkpoint, and export it."""
    require(*_NEEDED)
    say(f"training by {recipe} in {run}")
    check_push(push)
    from experiments.run.schema.recipe import load_training

    training = load_training(recipe, changes or [])
    options = Options(Machine(mesh, coordinator, processes, process), mirror, logs, profile)
    with started(run, options) as watch:
        from experiments.report.write import finish
        from experiments.run.pipeline import Run

        figures = finish(Run(training, run, watch=watch))
        _advise(training, run)
        upload(run / "export", push)
    scores = figures["scores"]
    rows = [("parameters", count(figures["params"])), ("exact match (macro)", f"{scores['exact_match']:.4f}")]
    rows += [(f"... {kind or '-'}", f"{value:.4f}") for kind, value in scores["by_type"].items()]
    energy = figures["energy"]
    rows.append((f"energy, {energy['source']}", f"{energy['kwh']:.3g} kWh, {energy['kg_co2']:.3g} kg CO2"))
    _print_result(figures, as_json, table(["", "teacher"], rows), f"model: {run / 'export'}")


def recombine(
    recipe: Recipe,
    run: RunDir,
    sources: Annotated[
        list[str],
        typer.Option(
            "--from",
            metavar="STAGE[:AXES]",
            help="A finished stage, and patterns of axes to take from it (default: all pruned ones). Can be repeated.",
        ),
    ],
    steps: Annotated[int, typer.Option(min=1, help="Distillation steps of the recombined model.")],
    changes: Set = None,
    push: Push = "",
    as_json: Json = False,
    mesh: Mesh = "",
    coordinator: Coordinator = "",
    processes: Processes = 1,
    process: Process = 0,
    mirror: Mirror = "",
    logs: Log = None,
    profile: Profile = "",
) -> None:
    """Merge prunings of several runs of one teacher, each axis from one run; prune the teacher, and distil it."""
    require(*_NEEDED, "torch")
    say(f"recombining {', '.join(sources)} by {recipe} in {run}")
    check_push(push)
    options = Options(Machine(mesh, coordinator, processes, process), mirror, logs, profile)
    with started(run, options) as watch:
        from experiments.report.write import finish
        from experiments.run.recombining import Source
        from experiments.run.recombining import recombine as joined

        figures = finish(
            joined(recipe, run, [Source.parse(text) for text in sources], steps, changes or [], watch=watch)
        )
        upload(run / "export", push)
    _print_comparison(figures, run, as_json)


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run.")],
    again: Annotated[bool, typer.Option("--again", help="Evaluate and time the models again.")] = False,
    as_json: Json = False,
    mesh: Mesh = "",
) -> None:
    """Print the report of a run, and render its Markdown and HTML again; measure first what has not been measured."""
    require("report")
    say(f"report: {run}")
    checked, written = run / "report" / "gate.json", run / "report" / "report.json"
    if again or (checked.exists() and not written.exists()):
        _measure(run, mesh)
    figures = _figures(run)
    if "teacher" not in figures:  # of `antgmm train`
        emit(figures, as_json, json.dumps(figures, indent=1))
        return
    from rich.markdown import Markdown

    from experiments.report.write import render

    text = render(run / "report", figures)
    emit(figures, as_json, Markdown(text), _places(run, "report.html"))


def _measure(run: Path, mesh: str) -> None:
    """Measures the report of a run that is complete without it."""
    require(*_NEEDED)
    from experiments.run.schema.recipe import load_recipe

    recipe = load_recipe(run / "recipe.toml")
    with started(run, Options(Machine(mesh, "", 1, 0))):
        from experiments.report.write import finish
        from experiments.run.pipeline import Run

        finish(Run(recipe, run))


def _places(run: Path, *reports: str) -> str:
    """Paths of a run's report and model."""
    shown = [f"report: {run / 'report' / name}" for name in reports]
    return "\n".join([*shown, f"model:  {run / 'export'}"])


def _figures(run: Path) -> dict[str, Any]:
    path = run / "report" / "report.json"
    if not path.exists():
        raise AntgmmError(f"{run} has no report: the run is not complete{state_of(run)}")
    return read_book(path, "run the command of the run again")


def _advise(recipe: "schema.Recipe | schema.Training", run: Path) -> None:
    """Says what a finished run has not learnt, and what to try."""
    from experiments.auto.advice import advice

    for line in advice(recipe, run):
        say(f"note: {line}")


def _print_result(figures: Mapping[str, Any], as_json: bool, *shown: Any) -> None:
    """Prints the result of a run in the first process."""
    from antgmm_jax.parallel.processes import is_first

    if is_first():
        emit(figures, as_json, *shown)


def _print_comparison(figures: Mapping[str, Any], run: Path, as_json: bool) -> None:
    """Prints a comparison of teacher and student."""
    from experiments.report.closing import summary

    _print_result(figures, as_json, summary(figures), _places(run, "report.html", "report.md"))


COMMANDS = {
    "demo": (demo, "antgmm demo --run runs/demo"),
    "compress": (
        compress,
        "antgmm compress recipe.toml --run runs/ads --mesh data=2,fsdp=4, or"
        " antgmm compress --model checkpoints/my-model --data ads.jsonl --smaller 8x",
    ),
    "train": (train, "antgmm train teacher.toml --run runs/teacher --set optimizer.batch_size=32"),
    "recombine": (
        recombine,
        "antgmm recombine recipe.toml --run runs/mix --steps 500"
        " --from 'runs/a/stages/01-blocks:*/layers' --from 'runs/b/stages/02-intermediate:*/mlp,*/heads'",
    ),
    "report": (report, "antgmm report runs/demo"),
}
