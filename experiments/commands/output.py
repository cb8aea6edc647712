"""What commands share: options, and figures as JSON or as a table on standard output."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

Json = Annotated[bool, typer.Option("--json", help="Figures as JSON on standard output.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Over the recipe, e.g. optimizer.batch_size=32. Can be repeated."),
]
Maybe = Annotated[Path | None, typer.Argument(metavar="[MODEL]", help="A Hugging Face directory.")]
Preset = Annotated[str, typer.Option(help="A preset in its place, such as antgmm-5b or llava-tiny.")]
Mesh = Annotated[
    str,
    typer.Option("--mesh", metavar="AXIS=N,...", help="Devices to run on, by data, fsdp and tensor; one without it."),
]
Coordinator = Annotated[
    str,
    typer.Option(
        "--coordinator",
        metavar="HOST:PORT",
        envvar="JAX_COORDINATOR_ADDRESS",
        help="Where process 0 of several answers; 'auto' in a Slurm or Kubernetes job.",
    ),
]
Processes = Annotated[int, typer.Option("--processes", min=1, envvar="JAX_NUM_PROCESSES", help="How many there are.")]
Process = Annotated[int, typer.Option("--process", min=0, envvar="JAX_PROCESS_ID", help="Which of them this is.")]
RunDir = Annotated[Path, typer.Option("--run", metavar="DIR", help="The run's folder; a run found there goes on.")]


def emit(figures: Mapping[str, Any], as_json: bool, *shown: Any) -> None:
    """Prints a command's result.

    Args:
        figures: JSON types; other numbers are made floats.
        as_json: whether figures are wanted, or what is for people.
        shown: what is for people: text, or anything that rich renders.
    """
    if as_json:
        typer.echo(json.dumps(figures, indent=1, default=float))
        return
    console = Console(highlight=False, markup=False, emoji=False)
    for part in shown:
        console.print(part, soft_wrap=isinstance(part, str))


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], title: str = "") -> Table:
    """A table for people; all columns but the first to the right.

    Args:
        head: names of the columns.
        rows: cells.
        title: above it.

    Returns:
        The table.
    """
    made = Table(title=title or None, title_justify="left")
    for place, name in enumerate(head):
        made.add_column(name, justify="right" if place else "left", overflow="fold")
    for row in rows:
        made.add_row(*map(str, row))
    return made


def count(number: float) -> str:
    """A large number with its unit, three digits."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.3g}"
