"""Commands of `antgmm lab`: benchmarks, studies and energy estimates."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from antgmm_jax.errors import AntgmmError
from antgmm_jax.extras import require
from data.limits import MOST_TOKENS
from experiments.commands import real, serving
from experiments.commands.output import Json, Mesh, Set, emit
from experiments.commands.runs import DEMO, packaged
from experiments.run.host.console import count, say, table


def bench(
    model: Annotated[
        Path | None, typer.Argument(metavar="[MODEL]", help="Hugging Face directory; antgmm-tiny by default.")
    ] = None,
    student: Annotated[
        Path | None, typer.Argument(metavar="[STUDENT]", help="A pruned model, to compare request times.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=3, help="Measured rounds; results are medians.")] = 9,
    large: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Folder with 13 GB of free space: also prunes a random antgmm-5b on disk there."
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Use small shapes, to check that it runs.")] = False,
    as_json: Json = False,
) -> None:
    """Measure relative speed of importance, training, decoding, requests and pruning."""
    require("torch")
    say("bench: measuring relative speed")
    from experiments.lab.bench.ratios import run, shown

    figures = run(model, student, large, rounds=rounds, quick=quick)
    emit(figures, as_json, *shown(figures))


def stalls(
    recipe: Annotated[
        Path | None, typer.Argument(metavar="[RECIPE]", help="A TOML file; the demo's recipe by default.")
    ] = None,
    changes: Set = None,
    rounds: Annotated[int, typer.Option(min=3, help="Measured rounds; results are medians.")] = 9,
    steps: Annotated[int, typer.Option(min=1, help="Steps of each loop per round.")] = 20,
    as_json: Json = False,
) -> None:
    """Measure how long training waits for data, the teacher cache and checkpoints, in the last stage of a recipe."""
    say("stalls: measuring what a training step waits for")
    from experiments.lab.bench.stalls import run, shown
    from experiments.run.schema.recipe import load_recipe

    loaded = load_recipe(recipe, changes or []) if recipe else load_recipe(DEMO, packaged(changes))
    figures = run(loaded, rounds=rounds, steps=steps)
    emit(figures, as_json, *shown(figures))


def stream(
    rows: Annotated[list[int] | None, typer.Option(min=64, help="Number of rows. Can be repeated.")] = None,
    side: Annotated[int, typer.Option(min=16, help="Side of the model's images in pixels.")] = 64,
    as_json: Json = False,
) -> None:
    """Measure memory and time to the first batch for 2 000 and 200 000 rows, without and with a cache."""
    say("stream: measuring memory and time to the first batch")
    from experiments.lab.bench.stream import run, shown

    figures = run(rows or (2_000, 200_000), side=side)
    emit(figures, as_json, *shown(figures))


def accelerator(
    student: Annotated[
        str, typer.Option(help="Preset to train; by default chosen for the device and its memory.")
    ] = "",
    teacher: Annotated[str, typer.Option(help="Preset of the teacher; by default chosen likewise.")] = "",
    dtype: Annotated[
        str, typer.Option(help="Dtype of computation, bfloat16 or float32; by default float32 on a CPU, else bfloat16.")
    ] = "",
    batch: Annotated[
        list[int] | None,
        typer.Option(min=1, max=MOST_TOKENS, help="Batch size of the train step. Can be repeated."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=0, help="Measured rounds; 0 for the default of the device.")] = 0,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write the figures to this file, as JSON.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check and benchmark the first device of JAX: peak rates, and training and serving relative to them."""
    say("accelerator: measuring the first device of JAX")
    import jax

    from experiments.lab.bench.accelerator import defaults, measure, memory
    from experiments.lab.bench.tables import shown
    from experiments.run.files import write_json

    options = {
        "student": student,
        "teacher": teacher,
        "dtype": dtype,
        "batches": tuple(sorted(set(batch or ()))),
        "rounds": rounds,
    }
    settings = defaults(jax.devices()[0].platform, memory())
    figures = measure(settings._replace(**{name: value for name, value in options.items() if value}))
    if out is not None:
        write_json(out, figures)
    emit(figures, as_json, *shown(figures))


def study(
    path: Annotated[Path, typer.Argument(metavar="STUDY", help="A TOML file with a recipe and arms that change it.")],
    run: Annotated[
        Path, typer.Option("--run", metavar="DIR", help="Folder of all runs; an existing study is resumed.")
    ],
    out: Annotated[Path, typer.Option(metavar="FILE", help="Results as JSON; also writes .md and .svg.")],
    arms: Annotated[
        list[str] | None, typer.Option("--arm", metavar="NAME", help="Run only this arm. Can be repeated.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Run a study arm by arm and report scores with their spread. Several processes can share a study."""
    require("energy", "eval", "report", "torch")
    say(f"study: running the arms of {path} in {run}")
    from experiments.lab.study.arms import load_study

    chosen = load_study(path)
    from experiments.lab.study.run import run_study
    from experiments.lab.study.summary import HEAD, rows

    results = run_study(chosen, run, out, only=arms or ())
    emit({"results": results}, as_json, table(HEAD, rows(results)), f"results: {out}")


def peers(
    out: Annotated[Path, typer.Option(metavar="FILE", help="Results as JSON; also writes .md and .svg.")],
    work: Annotated[
        Path,
        typer.Option(
            metavar="DIR", help="Folder of weights, texts and single results; an existing comparison is resumed."
        ),
    ] = Path("runs/peers"),
    python: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Python of the peers' environment; by default that of `make peers-env`."),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; results are medians and ranges.")] = 5,
    samples: Annotated[int, typer.Option(min=8, help="Samples of the data set; every library sees each once.")] = 192,
    as_json: Json = False,
) -> None:
    """Compare distillation with TRL's GKD and google-tunix on one task and one core, in alternating processes."""
    require("report")
    say(f"peers: comparing distillation with TRL and google-tunix in {work}")
    from experiments.lab.peers.results import compare
    from experiments.lab.peers.runs import PYTHON
    from experiments.lab.peers.summaries import sentences, tables
    from experiments.lab.peers.task import Task

    figures = compare(Task(rows=samples), work, out, python=python or PYTHON, repeats=repeats)
    shown = [table(each.head, each.rows) for each in tables(figures)]
    emit(figures, as_json, *shown, *sentences(figures), f"results: {out}")


def servers(
    out: Annotated[Path, typer.Option(metavar="FILE", help="Results as JSON.")],
    work: Annotated[Path, typer.Option(metavar="DIR", help="Folder of exports and logs.")] = Path("runs/servers"),
    preset: Annotated[
        list[str] | None, typer.Option("--preset", metavar="NAME", help="Only this preset. Can be repeated.")
    ] = None,
    python: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Python of vLLM's environment; by default of `make vllm-env`.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare token ids, pixels and answers of a pruned export of each family in JAX, transformers and vLLM."""
    require("torch")
    say(f"servers: comparing pruned exports in JAX, transformers and vLLM in {work}")
    from experiments.lab.servers.compare import HEAD, PYTHON, rows, run
    from experiments.run.files import write_json

    figures = run(work, python or PYTHON, names=preset or ())
    write_json(out, figures)
    emit(figures, as_json, table(HEAD, rows(figures)), f"results: {out}")


def plans(
    out: Annotated[Path, typer.Option(metavar="FILE", help="Results as JSON; plans in it are kept.")],
    case: Annotated[
        list[str] | None, typer.Option("--case", metavar="NAME", help="Only this case. Can be repeated.")
    ] = None,
    machine: Annotated[
        list[str] | None,
        typer.Option("--machine", metavar="CHIP-COUNT", help="Only this machine, such as v5e-16. Can be repeated."),
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Compile again what the file has.")] = False,
    as_json: Json = False,
) -> None:
    """Plan the steps of experiments/lab/planning/plans.toml on several machines, each with the chip's own compiler."""
    say(f"plans: compiling steps for several machines into {out}")
    from experiments.lab.planning import cases as planning
    from experiments.lab.planning import compilers
    from experiments.run.host.meshes import simulate

    cases, machines = planning.load()
    chosen = [planning.machine(name) for name in machine or ()] or machines
    for chip in dict.fromkeys(chip for chip, _ in chosen):
        compilers.check(chip)
    compilers.only_compile()
    simulate(1)
    if unknown := {*(case or ())} - {each.name for each in cases}:
        raise AntgmmError(f"--case {min(unknown)}: choose one of {', '.join(each.name for each in cases)}")
    figures = planning.run(out, [each for each in cases if not case or each.name in case], chosen, again=again)
    emit(figures, as_json, table(planning.HEAD, planning.rows(figures)), f"results: {out}")


def energy(
    watts: Annotated[
        float, typer.Option(min=0, help="Power of an accelerator and its share of the server under load.")
    ],
    teacher_ms: Annotated[float, typer.Option(min=0, help="Latency of a request to the teacher in milliseconds.")],
    student_ms: Annotated[float, typer.Option(min=0, help="Latency of a request to the student in milliseconds.")],
    rate: Annotated[float | None, typer.Option(min=0, help="Requests per second, day and night.")] = None,
    kwh_a_year: Annotated[float | None, typer.Option(min=0, help="Claimed saving, instead of --rate.")] = None,
    pue: Annotated[float, typer.Option(min=1, help="Power usage effectiveness of the data centre.")] = 1.0,
    as_json: Json = False,
) -> None:
    """Compute the energy of a request rate with teacher and student, or the rate that a claimed saving implies."""
    say("energy: computing the energy of requests to teacher and student")
    from experiments.lab.fleet import service

    figures = service(watts, pue, teacher_ms, student_ms, kwh=kwh_a_year, rate=rate)
    names = {"joules": "J per request", "kwh_a_year": "kWh per year", "megawatts": "MW", "busy": "busy accelerators"}
    models = ("teacher", "student", "saved")
    rows = [(name, *(count(figures[model][key]) for model in models)) for key, name in names.items()]
    rates = f"{count(figures['requests_a_second'])} requests per second, {count(figures['requests_a_day'])} per day"
    emit(figures, as_json, table(["", *models], rows, rates))


class Mode(StrEnum):
    """Where the targets of a teacher come from: a cache on disk, or the teacher itself."""

    CACHE = "cache"
    ONLINE = "online"


def memory(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder for a random teacher and the run, 5 GB.")],
    mode: Annotated[Mode, typer.Option(help="Teacher.")] = Mode.CACHE,
    mesh: Mesh = "",
    as_json: Json = False,
) -> None:
    """Measure the peak memory of each phase of a whole compression of a random model with 290 million parameters."""
    require("torch")
    say(f"memory: compressing a random model in {folder}")
    from experiments.run.host.meshes import devices

    with devices(mesh, "", 1, 0):
        from experiments.lab.memory import measure, shown

        figures = measure(folder, mode.value)
    emit(figures, as_json, shown(figures))


def tasks(
    run: Annotated[
        Path, typer.Option("--run", metavar="DIR", help="Folder of rows and runs; existing ones are resumed.")
    ],
    out: Annotated[Path, typer.Option(metavar="FILE", help="Results as JSON; also writes .md.")],
    names: Annotated[
        list[str] | None,
        typer.Option("--task", help="digits, charts, photos or tables; all by default. Can be repeated."),
    ] = None,
    smaller: Annotated[str, typer.Option(metavar="8x", help="How many times fewer parameters the student has.")] = "8x",
    minutes: Annotated[
        float, typer.Option(min=1, max=10_000, metavar="M", help="Duration of each compression.")
    ] = 10.0,
    as_json: Json = False,
) -> None:
    """Compress teachers of digits, charts, photographs and tables without a recipe, beside controls from scratch."""
    require("tasks", "torch", "report")
    say(f"tasks: training, compressing and controls in {run}")
    from experiments.auto.goal import ratio
    from experiments.lab.tasks.study import HEAD, TASKS, table_rows
    from experiments.lab.tasks.study import run as run_task

    ratio(smaller)
    if unknown := [name for name in names or () if name not in TASKS]:
        raise AntgmmError(f"no task {unknown[0]!r}: choose one of {', '.join(TASKS)}")
    figures = {}
    for name in names or TASKS:
        figures = run_task(name, run, out, smaller=smaller, minutes=minutes)
    emit(figures, as_json, table(HEAD, table_rows(figures)), f"results: {out}")


COMMANDS = {
    **real.COMMANDS,
    "bench": (bench, "antgmm lab bench experiments/teachers/maad-m runs/demo/export --json"),
    "stalls": (stalls, "antgmm lab stalls --set checkpoint_every=100"),
    "stream": (stream, "antgmm lab stream --rows 2000 --rows 20000"),
    "memory": (memory, "antgmm lab memory runs/memory --mesh fsdp=8"),
    "accelerator": (
        accelerator,
        "antgmm lab accelerator --student antgmm-300m --teacher antgmm-5b --out h100.json",
    ),
    "study": (
        study,
        "antgmm lab study experiments/lab/studies/study.toml --run runs/study"
        " --out experiments/lab/results/study.json --arm full --arm scratch",
    ),
    "tasks": (tasks, "antgmm lab tasks --run runs/tasks --out experiments/lab/results/tasks.json --task digits"),
    "peers": (peers, "antgmm lab peers --out experiments/lab/results/peers.json, after make peers-env"),
    "servers": (servers, "antgmm lab servers --out runs/servers.json --preset llava-tiny, after make vllm-env"),
    **serving.LAB,
    "plans": (plans, "antgmm lab plans --out experiments/lab/results/plans.json --machine v5e-16"),
    "energy": (
        energy,
        "antgmm lab energy --watts 400 --teacher-ms 700 --student-ms 90 --kwh-a-year 75e6"
        " (which rate saves that much?), or --rate 100 (how much does that rate save?)",
    ),
}
