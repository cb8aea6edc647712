"""Common options of commands, and printing of results as JSON or tables."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from antgmm_jax.errors import disk_errors
from antgmm_jax.extras import require
from data.limits import LONGEST_ANSWER, MOST_TOKENS
from experiments.commands.sources import FORMS
from experiments.run.export.schemes import Scheme
from experiments.run.files import json_text
from experiments.run.host.console import printable, say, working

Json = Annotated[bool, typer.Option("--json", help="Print results as JSON.")]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Override a recipe key, e.g. optimizer.batch_size=32. Can be repeated."
    ),
]
MODELS = "A Hugging Face directory, or hf:ORG/NAME"
Maybe = Annotated[Path | None, typer.Argument(metavar="[MODEL]", help=f"{MODELS}.")]
Prompt = Annotated[
    str,
    typer.Option(metavar="TEMPLATE", help="Prompt template as in recipes; by default that of the model's antgmm.json."),
]
CheckData = Annotated[
    str, typer.Option(metavar="DATA", help=f"Prompts of the check, {FORMS}; random prompts by default.")
]
Length = Annotated[
    int,
    typer.Option(
        min=0,
        max=MOST_TOKENS,
        help="Prompt tokens of a request, including image tokens; 0 for 64, or 32 more than an image has.",
    ),
]
MaxNewTokens = Annotated[int, typer.Option(min=1, max=LONGEST_ANSWER, help="Maximum length of an answer.")]
CheckTokens = Annotated[
    int,
    typer.Option(
        min=0,
        max=LONGEST_ANSWER,
        help="Maximum length of an answer; 0 for the longest one of --data, at least 32.",
    ),
]
CheckSamples = Annotated[int, typer.Option(min=1, help="Number of prompts; fewer if --data has fewer.")]
Push = Annotated[
    str,
    typer.Option(metavar="hf:ORG/NAME", help="Also upload the export to the Hub; a new repository is private."),
]
Quantize = Annotated[
    Scheme | None,
    typer.Option(
        "--quantize",
        metavar="SCHEME",
        help="Also write a quantized copy beside the export (w8a8, w4a16 or fp8), and score it in PyTorch.",
    ),
]
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
        help="Address of process 0, with several processes; 'auto' in a Slurm job or on a TPU slice of GKE.",
    ),
]
Processes = Annotated[int, typer.Option("--processes", min=1, envvar="JAX_NUM_PROCESSES", help="Number of processes.")]
Process = Annotated[int, typer.Option("--process", min=0, envvar="JAX_PROCESS_ID", help="Number of this process.")]
Commands = Mapping[str, tuple[Callable[..., None], str]]
"""Name -> function and an example command line."""
Mirror = Annotated[
    str,
    typer.Option(
        "--mirror",
        metavar="URL",
        help="Keep a copy of the run in a store (gs://, s3://), and continue from it elsewhere.",
    ),
]
Log = Annotated[
    list[str] | None,
    typer.Option("--log", metavar="NAME", help="Metrics for tensorboard, wandb or trackio. Can be repeated."),
]
Profile = Annotated[
    str, typer.Option("--profile", metavar="FIRST:LAST", help="Steps to trace, from 0, of the first stage that trains.")
]
RunDir = Annotated[Path, typer.Option("--run", metavar="DIR", help="Folder of the run; an existing run is resumed.")]


def emit(figures: Mapping[str, Any], as_json: bool, *shown: Any) -> None:
    """Prints the result of a command.

    Args:
        figures: result as JSON types; other numbers are converted to floats.
        as_json: whether to print `figures` as JSON, or else `shown`.
        shown: texts, or objects that rich renders.

    Raises:
        AntgmmError: the disk on which standard output is has an error.
    """
    with disk_errors("standard output"):
        if as_json:
            typer.echo(json_text(figures))
            return
        console = Console(highlight=False, markup=False, emoji=False)
        for part in shown:
            console.print(printable(part) if isinstance(part, str) else part, soft_wrap=isinstance(part, str))


def check_quantized(model: str | Path, scheme: Scheme) -> None:
    """Checks `--quantize` before anything is computed.

    Args:
        model: Hugging Face directory, or a name of the Hub.
        scheme: its value.

    Raises:
        AntgmmError: its library is missing, or cannot quantize models of this family.
    """
    require("quantize")
    from antgmm_jax.io.convert import open_hf
    from experiments.run.export.schemes import check_scheme

    check_scheme(open_hf(model)[0], scheme)


def check_push(name: str) -> None:
    """Checks `--push` before there is anything to upload.

    Args:
        name: its value; "" for no upload.

    Raises:
        AntgmmError: it is not a name of the Hub, or network access is forbidden.
    """
    if name:
        from antgmm_jax.io.hub import check_target

        check_target(name)


def upload(directory: Path, name: str) -> None:
    """Uploads an export to the Hub, in the first process of a run, while the others wait.

    Args:
        directory: Hugging Face directory.
        name: value of `--push`; "" for no upload.

    Raises:
        AntgmmError: the upload failed; every process raises it.
    """
    from antgmm_jax.io.hub import push
    from antgmm_jax.parallel.processes import run_on_first

    if not name:
        return
    with working(f"uploading {directory} to {name}"):
        url = run_on_first(lambda: push(directory, name))
    if url:
        say(f"uploaded: {url}")
