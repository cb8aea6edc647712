"""Commands for runs: demo, train, compress, recombine and report."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from antgmm_jax.errors import AntgmmError
from antgmm_jax.extras import require
from antgmm_jax.io.books import read_book
from experiments.commands import goals, quality
from experiments.commands.endings import NEEDED, advise, places, print_comparison, print_end, print_plan, print_result
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
    Quantize,
    RunDir,
    Set,
    check_push,
    check_quantized,
    emit,
    upload,
)
from experiments.commands.starting import Machine, Options, check_options, started, state_of
from experiments.run.host.console import count, say, table

if TYPE_CHECKING:
    from experiments.run.folder import RunFolder

_EXPERIMENTS = Path(__file__).resolve().parent.parent
DEMO = _EXPERIMENTS / "recipes" / "demo.toml"
TEACHER = _EXPERIMENTS / "teachers" / "maad-m"
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
    params: goals.Parameters = "",
    latency_ms: goals.Latency = 0.0,
    keep_quality: goals.Keep = "",
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
    quantize: Quantize = None,
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
    model and data, writes a recipe next to the folder of the run, and runs it. With --keep-quality it does so for
    several sizes and keeps the smallest student that is good enough.
    """
    options = Options(Machine(mesh, coordinator, processes, process), mirror, logs, profile)
    wish = goals.Wish(model, data, test, smaller, params, latency_ms, keep_quality, minutes)
    goals.check(recipe, wish, plan_only=plan_only, together=processes > 1 or bool(coordinator), mirror=mirror)
    folder = run or goals.run_of(recipe, wish)
    if recipe is None and folder.name in ("", ".."):
        raise AntgmmError(f"--run {folder}: name a folder of its own, as the plan is written beside it")
    if wish.keep:
        if quantize:
            raise AntgmmError("--quantize does not go with --keep-quality: use antgmm export --quantize afterwards")
        quality.keep(wish, folder, changes or [], options, as_json, push, plan_only=plan_only, as_report=as_report)
        return
    path = recipe or _planned(wish, folder, changes or [], options, push, quantize)
    if plan_only:
        goals.advise_changes(path, changes or [])
        print_plan(path, as_json)
    else:
        _compress(path, folder, changes or [], options, as_json, push, as_report=as_report, scheme=quantize)


def _planned(wish: goals.Wish, run: Path, changes: list[str], options: Options, push: str, scheme: Quantize) -> Path:
    """The recipe of a wish, written next to the folder of its run."""
    require(*NEEDED, "torch")
    goal = wish.goal(changes, scheme)
    say(f"plan: compressing {wish.model} with {wish.data}")
    check_options(run, options)
    check_push(push)
    if scheme:
        check_quantized(wish.model, scheme)
    from experiments.auto.plan import planned
    from experiments.run.folder import RECIPE, RunFolder
    from experiments.run.host.meshes import devices

    RunFolder(run).check_free()
    plan = run.with_name(f"{run.name}.toml")
    if (run / RECIPE).exists() and not plan.exists():
        again = f"antgmm compress {run / RECIPE} --run {run}"
        raise AntgmmError(f"{run} is a run without its plan {plan}: {again} continues it, or choose another --run")
    with devices(*options.machine):
        return planned(goal, plan)


def _compress(
    path: Path,
    run: Path,
    changes: list[str],
    options: Options,
    as_json: bool,
    push: str = "",
    *,
    as_report: bool = True,
    scheme: Quantize = None,
) -> None:
    require(*NEEDED, "torch")
    say(f"compressing by {path} in {run}")
    check_push(push)
    from experiments.run.schema import Recipe as Compression
    from experiments.run.schema.recipe import load_recipe

    recipe = load_recipe(path, changes)
    if scheme:
        check_quantized(recipe.teacher.path, scheme)
    with started(run, options, recipe) as watch:
        from experiments.report.write import finish
        from experiments.run.pipeline import Run

        made = Run(recipe, run, watch=watch)
        figures = finish(made, report=as_report)
        recipe = made.recipe  # with the commits of its names on the Hub
        assert isinstance(recipe, Compression)
        advise(recipe, run)
        if scheme:
            from experiments.run.export.quantized import advise_upload, quantize_export

            quantize_export(recipe, run / "export", scheme)
            advise_upload(run / "export", scheme, push)
        upload(run / "export", push)
    print_end(figures, run, as_json, as_report=as_report)


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
    require(*NEEDED)
    say(f"training by {recipe} in {run}")
    check_push(push)
    from experiments.run.schema.recipe import load_training

    training = load_training(recipe, changes or [])
    options = Options(Machine(mesh, coordinator, processes, process), mirror, logs, profile)
    with started(run, options, training) as watch:
        from experiments.report.write import finish
        from experiments.run.pipeline import Run

        made = Run(training, run, watch=watch)
        figures = finish(made)
        advise(made.recipe, run)
        upload(run / "export", push)
    rows, energy = [("parameters", count(figures["params"]))], figures["energy"]
    if scores := figures.get("scores"):  # none after a phase of facts
        rows.append(("exact match (macro)", f"{scores['exact_match']:.4f}"))
        rows += [(f"... {kind or '-'}", f"{value:.4f}") for kind, value in scores["by_type"].items()]
    rows.append((f"energy, {energy['source']}", f"{energy['kwh']:.3g} kWh, {energy['kg_co2']:.3g} kg CO2"))
    print_result(figures, as_json, table(["", "teacher"], rows), f"model: {run / 'export'}")


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
    require(*NEEDED, "torch")
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
    print_comparison(figures, run, as_json)


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run.")],
    again: Annotated[bool, typer.Option("--again", help="Evaluate and time the models again.")] = False,
    as_json: Json = False,
    mesh: Mesh = "",
) -> None:
    """Print the report of a run, and render its Markdown and HTML again; measure first what has not been measured."""
    require("report")
    say(f"report: {run}")
    from experiments.run.folder import REPORT, RunFolder

    folder = RunFolder(run)
    if folder.checksums.exists() and (again or (folder.gate.exists() and not (folder.report / REPORT).exists())):
        _measure(folder, mesh, again)
    figures = _figures(run)
    if "teacher" not in figures:  # of `antgmm train`
        emit(figures, as_json, json.dumps(figures, indent=1))
        return
    from rich.markdown import Markdown

    from experiments.report.write import render

    text = render(run / "report", figures)
    emit(figures, as_json, Markdown(text), places(run, "report.html"))


def _measure(folder: "RunFolder", mesh: str, again: bool) -> None:
    """Measures the report of a run that is complete without it, or `again`."""
    require(*NEEDED)
    from experiments.report.choices import SEARCH
    from experiments.run.folder import RECIPE
    from experiments.run.schema.recipe import load_any
    from experiments.run.scores.scoring import STORED

    if (folder.path / SEARCH).exists():
        raise AntgmmError(
            f"{folder.path} is a search with a run for each student: measure its smallest one by `antgmm report"
            f" {folder.path}/N --again`, then repeat the command of the search to copy its report"
        )
    recipe = load_any(folder.path / RECIPE)
    if again:
        with folder.alone():
            for scores in folder.cache.glob(STORED):
                scores.unlink()
    with started(folder.path, Options(Machine(mesh, "", 1, 0))):
        from experiments.report.write import finish
        from experiments.run.pipeline import Run

        finish(Run(recipe, folder.path), again=again)


def _figures(run: Path) -> dict[str, Any]:
    path = run / "report" / "report.json"
    if not path.exists():
        raise AntgmmError(f"{run} has no report: the run is not complete{state_of(run)}")
    return read_book(path, "run the command of the run again")


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
