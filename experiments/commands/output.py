"""Common options of commands, and printing of results as JSON or tables."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

Json = Annotated[bool, typer.Option("--json", help="Print results as JSON.")]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Override a recipe key, e.g. optimizer.batch_size=32. Can be repeated."
    ),
]
Maybe = Annotated[Path | None, typer.Argument(metavar="[MODEL]", help="A Hugging Face directory.")]
Preset = Annotated[str, typer.Option(help="A preset instead, such as antgmm-5b or llava-tiny.")]
Mesh = Annotated[
    str,
    typer.Option("--mesh", metavar="AXIS=N,...", help="Devices by data, fsdp and tensor; one device by default."),
]
Coordinator = Annotated[
    str,
    typer.Option(
        "--coordinator",
        metavar="HOST:PORT",
        envvar="JAX_COORDINATOR_ADDRESS",
        help="Address of process 0, with several processes; 'auto' in a Slurm or Kubernetes job.",
    ),
]
Processes = Annotated[int, typer.Option("--processes", min=1, envvar="JAX_NUM_PROCESSES", help="Number of processes.")]
Process = Annotated[int, typer.Option("--process", min=0, envvar="JAX_PROCESS_ID", help="Number of this process.")]
Commands = Mapping[str, tuple[Callable[..., None], str]]
"""Name -> function and an example command line."""
RunDir = Annotated[Path, typer.Option("--run", metavar="DIR", help="Folder of the run; an existing run is resumed.")]


def emit(figures: Mapping[str, Any], as_json: bool, *shown: Any) -> None:
    """Prints the result of a command.

    Args:
        figures: result as JSON types; other numbers are converted to floats.
        as_json: whether to print `figures` as JSON, or else `shown`.
        shown: texts, or objects that rich renders.
    """
    if as_json:
        typer.echo(json.dumps(figures, indent=1, default=float))
        return
    console = Console(highlight=False, markup=False, emoji=False)
    for part in shown:
        console.print(part, soft_wrap=isinstance(part, str))
