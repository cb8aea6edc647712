"""Commands that draw data and that measure speed."""

from enum import StrEnum
from itertools import accumulate
from pathlib import Path
from typing import Annotated

import typer

from experiments.commands.output import Json, emit, table


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
    app.command(epilog="Example: antgmm bench checkpoints/maad-m runs/demo/export --json")(bench)


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
    from experiments.console import bar

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
    from experiments.bench import run, shown

    figures = run(model, student, large, rounds=rounds, quick=quick)
    emit(figures, as_json, *shown(figures))
