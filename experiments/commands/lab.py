"""Commands of `antgmm lab`: how fast, how well and at what energy; nothing that a user's run needs."""

from pathlib import Path
from typing import Annotated

import typer

from antgmm_jax.extras import require
from experiments.commands.output import Json, Set, emit
from experiments.commands.runs import DEMO, packaged
from experiments.run.host.console import count, say, table


def bench(
    model: Annotated[
        Path | None, typer.Argument(metavar="[MODEL]", help="Hugging Face directory; antgmm-tiny if none is given.")
    ] = None,
    student: Annotated[
        Path | None, typer.Argument(metavar="[STUDENT]", help="A cut one, to compare request times with.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=3, help="Rounds that are timed; medians are told.")] = 9,
    large: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="A folder with 13 GB free: also cuts a random antgmm-5b on disk there."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Small shapes: whether it runs, not how fast.")] = False,
    as_json: Json = False,
) -> None:
    """Measure speed as ratios, both sides in turn in one run: importance, training, decoding, requests, cuts."""
    require("torch")
    say("bench: measuring speed as ratios")
    from experiments.lab.bench.ratios import run, shown

    figures = run(model, student, large, rounds=rounds, quick=quick)
    emit(figures, as_json, *shown(figures))


def stalls(
    recipe: Annotated[Path | None, typer.Argument(metavar="[RECIPE]", help="The demo's if none is given.")] = None,
    changes: Set = None,
    rounds: Annotated[int, typer.Option(min=3, help="Rounds that are timed; medians are told.")] = 9,
    steps: Annotated[int, typer.Option(min=1, help="Steps of each loop in a round.")] = 20,
    as_json: Json = False,
) -> None:
    """Measure what the training loop of a recipe's last stage waits for: data, the teacher's cache, checkpoints."""
    say("stalls: measuring what a training step waits for")
    from experiments.lab.bench.stalls import run, shown
    from experiments.run.schema.recipe import load_recipe

    loaded = load_recipe(recipe, changes or []) if recipe else load_recipe(DEMO, packaged(changes))
    figures = run(loaded, rounds=rounds, steps=steps)
    emit(figures, as_json, *shown(figures))


def stream(
    rows: Annotated[list[int] | None, typer.Option(min=64, help="Rows of the data. Can be repeated.")] = None,
    side: Annotated[int, typer.Option(min=16, help="Pixels of the model's pictures.")] = 64,
    as_json: Json = False,
) -> None:
    """Measure memory and the time to the first batch of data of 2 000 and of 200 000 rows, new and started again."""
    say("stream: measuring memory and the time to the first batch")
    from experiments.lab.bench.stream import run, shown

    figures = run(rows or (2_000, 200_000), side=side)
    emit(figures, as_json, *shown(figures))


def accelerator(
    student: Annotated[
        str, typer.Option(help="Preset that is trained; chosen by the device and its memory unless given.")
    ] = "",
    teacher: Annotated[str, typer.Option(help="Preset that it learns from; the same.")] = "",
    dtype: Annotated[
        str, typer.Option(help="What both compute in, bfloat16 or float32; float32 on a CPU unless given.")
    ] = "",
    batch: Annotated[
        list[int] | None, typer.Option(min=1, help="A batch size of the train step. Can be repeated.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=0, help="Rounds that are timed; 0 for the device's own number.")] = 0,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Also writes the figures there, as JSON.")] = None,
    as_json: Json = False,
) -> None:
    """Measure the first GPU, TPU or CPU that JAX sees: correctness, its own rates, training and serving as shares."""
    say("accelerator: measuring the first device that JAX sees")
    import jax

    from experiments.lab.bench.accelerator import defaults, measure, memory
    from experiments.lab.bench.tables import shown
    from experiments.run.folder import write_json

    given = {
        "student": student,
        "teacher": teacher,
        "dtype": dtype,
        "batches": tuple(sorted(set(batch or ()))),
        "rounds": rounds,
    }
    asked = defaults(jax.devices()[0].platform, memory())
    figures = measure(asked._replace(**{name: value for name, value in given.items() if value}))
    if out is not None:
        write_json(out, figures)
    emit(figures, as_json, *shown(figures))


def study(
    path: Annotated[Path, typer.Argument(metavar="STUDY", help="A TOML file: a recipe and arms that change it.")],
    run: Annotated[
        Path, typer.Option("--run", metavar="DIR", help="Folder of all its runs; a study found there goes on.")
    ],
    out: Annotated[Path, typer.Option(metavar="FILE", help="Results as JSON; beside it .md and .svg.")],
    arms: Annotated[
        list[str] | None, typer.Option("--arm", metavar="NAME", help="Only these. Can be repeated.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Run a study arm by arm and tell the scores with their spread; a second process takes other runs of it."""
    require("energy", "eval", "report", "torch")
    say(f"study: running the arms of {path}, in {run}")
    from experiments.lab.study.arms import load_study

    chosen = load_study(path)
    from experiments.lab.study.run import run_study
    from experiments.lab.study.summary import HEAD, rows

    results = run_study(chosen, run, out, only=arms or ())
    emit({"results": results}, as_json, table(HEAD, rows(results)), f"results: {out}")


def peers(
    out: Annotated[Path, typer.Option(metavar="FILE", help="Results as JSON; beside it .md and .svg.")],
    work: Annotated[
        Path, typer.Option(metavar="DIR", help="Weights, text and single results; a comparison found there goes on.")
    ] = Path("runs/peers"),
    python: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Python of the peers' environment; that of `make peers-env` unless given."),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; medians and ranges are told.")] = 5,
    samples: Annotated[int, typer.Option(min=8, help="Samples of the data set, each seen once by each peer.")] = 192,
    as_json: Json = False,
) -> None:
    """Hold distillation against TRL's GKD and google-tunix: one task, one core, each a process of its own, in turn."""
    require("report")
    say(f"peers: comparing distillation with TRL and google-tunix, in {work}")
    from experiments.lab.peers.results import compare
    from experiments.lab.peers.runs import PYTHON
    from experiments.lab.peers.summaries import sentences, tables
    from experiments.lab.peers.task import Task

    figures = compare(Task(rows=samples), work, out, python=python or PYTHON, repeats=repeats)
    shown = [table(each.head, each.rows) for each in tables(figures)]
    emit(figures, as_json, *shown, *sentences(figures), f"results: {out}")


def energy(
    watts: Annotated[float, typer.Option(min=0, help="Of an accelerator with its share of a server, serving.")],
    teacher_ms: Annotated[float, typer.Option(min=0, help="Latency of a request to the teacher.")],
    student_ms: Annotated[float, typer.Option(min=0, help="To the student.")],
    rate: Annotated[float | None, typer.Option(min=0, help="Requests a second, day and night.")] = None,
    kwh_a_year: Annotated[
        float | None, typer.Option(min=0, help="In place of --rate: what is said to be saved.")
    ] = None,
    pue: Annotated[float, typer.Option(min=1, help="Power of the data centre over that of its servers.")] = 1.0,
    as_json: Json = False,
) -> None:
    """Tell what a rate of requests costs with teacher and student, or which rate a claimed saving implies."""
    say("energy: of a service with teacher and student")
    from experiments.lab.fleet import service

    figures = service(watts, pue, teacher_ms, student_ms, kwh=kwh_a_year, rate=rate)
    names = {"joules": "J a request", "kwh_a_year": "kWh a year", "megawatts": "MW", "busy": "busy accelerators"}
    models = ("teacher", "student", "saved")
    rows = [(name, *(count(figures[model][key]) for model in models)) for key, name in names.items()]
    rates = f"{count(figures['requests_a_second'])} requests a second, {count(figures['requests_a_day'])} a day"
    emit(figures, as_json, table(["", *models], rows, rates))


COMMANDS = {
    "bench": (bench, "antgmm lab bench experiments/teachers/maad-m runs/demo/export --json"),
    "stalls": (stalls, "antgmm lab stalls --set checkpoint_every=100"),
    "stream": (stream, "antgmm lab stream --rows 2000 --rows 20000"),
    "accelerator": (
        accelerator,
        "antgmm lab accelerator --student antgmm-300m --teacher antgmm-5b --out h100.json",
    ),
    "study": (
        study,
        "antgmm lab study experiments/lab/studies/study.toml --run runs/study"
        " --out experiments/lab/results/study.json --arm full --arm scratch",
    ),
    "peers": (peers, "antgmm lab peers --out experiments/lab/results/peers.json, after `make peers-env`"),
    "energy": (
        energy,
        "antgmm lab energy --watts 400 --teacher-ms 700 --student-ms 90 --kwh-a-year 75e6"
        " (which rate saves that much?), or --rate 100 (how much does that rate save?)",
    ),
}
