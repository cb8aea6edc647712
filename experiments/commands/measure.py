"""Commands that draw data, that measure speed, and that tell what a service's energy comes to."""

from enum import StrEnum
from itertools import accumulate
from pathlib import Path
from typing import Annotated

import typer

from experiments.commands.output import Json, Set, emit
from experiments.commands.runs import DEMO, packaged
from experiments.run.host.console import count, table


class Form(StrEnum):
    """Forms that data is written in."""

    PARQUET = "parquet"
    JSONL = "jsonl"


def register(app: typer.Typer) -> None:
    """Adds this file's commands."""
    made = typer.Typer(no_args_is_help=True, epilog="Example: antgmm data maad --tier s --split test --out maad-s")
    made.command(epilog="Example: antgmm data maad --tier s --split test --samples 100 --out maad-s")(maad)
    # With a callback the one command keeps its name.
    made.callback()(_data)
    app.add_typer(made, name="data")
    app.command(epilog="Example: antgmm bench experiments/teachers/maad-m runs/demo/export --json")(bench)
    app.command(epilog="Example: antgmm stalls --set checkpoint_every=100")(stalls)
    app.command(
        epilog="Example: antgmm energy --watts 400 --teacher-ms 700 --student-ms 90 --kwh-a-year 75e6"
        " (which rate saves that much?), or --rate 100 (how much does that rate save?)"
    )(energy)


def _data() -> None:
    """Make data sets."""


def maad(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where to.")],
    tier: Annotated[str, typer.Option(help="s, m or full.")] = "s",
    split: Annotated[list[str] | None, typer.Option(help="train, val, test or test_hard; all unless given.")] = None,
    samples: Annotated[int, typer.Option(min=0, help="Records of each split; 0 for the data set's own sizes.")] = 0,
    seed: Annotated[int, typer.Option(help="Another seed is another data set.")] = 0,
    form: Annotated[Form, typer.Option("--format", help="jsonl has its pictures beside it.")] = Form.PARQUET,
    as_json: Json = False,
) -> None:
    """Draw MAAD-synth, advertisements with an auditor's questions, as files."""
    from antgmm_jax.errors import AntgmmError
    from data.maad.latents import SIZES
    from data.writers import write_maad
    from experiments.run.host.console import bar

    chosen = split or [*SIZES]
    if unknown := [name for name in chosen if name not in SIZES]:
        raise AntgmmError(f"no split {unknown[0]!r}: choose among {', '.join(SIZES)}")
    sizes = {name: samples or SIZES[name] for name in chosen}
    before = dict(zip(sizes, accumulate(sizes.values(), initial=0), strict=False))
    with bar(f"MAAD-synth {tier}", sum(sizes.values())) as update:
        info = write_maad(
            tier,
            out,
            sizes=sizes,
            seed=seed,
            form=form.value,
            progress=lambda name, done, total: update(before[Path(name).stem] + done, name),
        )
    rows = [(name, size, info["fingerprints"][name]) for name, size in sizes.items()]
    emit(info, as_json, table(["split", "records", "fingerprint"], rows), f"written: {out}")


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
    from experiments.lab.bench.stalls import run, shown
    from experiments.run.schema.recipe import load_recipe

    loaded = load_recipe(recipe, changes or []) if recipe else load_recipe(DEMO, packaged(changes))
    figures = run(loaded, rounds=rounds, steps=steps)
    emit(figures, as_json, *shown(figures))


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
    from experiments.lab.fleet import service

    figures = service(watts, pue, teacher_ms, student_ms, kwh=kwh_a_year, rate=rate)
    names = {"joules": "J a request", "kwh_a_year": "kWh a year", "megawatts": "MW", "busy": "busy accelerators"}
    models = ("teacher", "student", "saved")
    rows = [(name, *(count(figures[model][key]) for model in models)) for key, name in names.items()]
    rates = f"{count(figures['requests_a_second'])} requests a second, {count(figures['requests_a_day'])} a day"
    emit(figures, as_json, table(["", *models], rows, rates))
