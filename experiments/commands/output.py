"""What commands share: options, and `emit`, which prints figures as JSON or as a table on standard output."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

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
Commands = Mapping[str, tuple[Callable[..., None], str]]
"""Name -> function and an example of its use."""
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
