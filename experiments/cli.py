"""The command line `antgmm`.

Exit codes: 0 for success, 2 for an error in the input or environment (one line on stderr), 75 for one of another
process, 130 for Ctrl-C, 143 for a run that SIGTERM ended.
"""

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperGroup

from antgmm_jax.errors import AntgmmError, disk_errors, memory_error
from antgmm_jax.io.hub import OFFLINE
from antgmm_jax.parallel import preemption
from experiments.commands import data, lab, models, packages, runs, scores, serving, vocabulary
from experiments.commands import planning as plan
from experiments.commands import sizes as search
from experiments.commands.output import Commands
from experiments.run.host.accelerators import skip_absent_tpu
from experiments.run.host.allocator import keep_freed_memory
from experiments.run.host.console import printable

SHOWN = (
    *("demo", "compress", "train", "import", "eval", "export", "package", "serve"),
    *("search", "plan", "shrink", "vocabulary", "cost", "recombine", "report"),
)
"""Commands in the order of `antgmm --help`, before the groups `data` and `lab`."""

RESUMED = ("demo", "train", "compress", "recombine", "study", "tasks", "peers")
"""Commands that resume when they are run again."""

_UsageError: Any = typer.BadParameter.__base__
"""An error in the arguments. Its module, and that of a context, depend on the version of typer."""


class _Group(TyperGroup):
    """Prints errors that the user can fix as one line with an exit code; bugs keep their traceback."""

    def parse_args(self, ctx, args) -> list[str]:
        for argument in args:
            if (shown := argument.encode(errors="replace").decode()) != argument:
                raise _failure(f"{shown} is not UTF-8: rename it")
        with _usage_errors(ctx):
            return super().parse_args(ctx, args)

    def invoke(self, ctx) -> Any:
        try:
            with disk_errors(), _usage_errors(ctx):
                return super().invoke(ctx)
        except AntgmmError as error:
            raise _failure(str(error), error.exit_code) from error
        except (MemoryError, RuntimeError, ImportError) as error:
            if (line := memory_error(error)) is None:
                raise
            raise _failure(str(line)) from error
        except KeyboardInterrupt as error:
            again = "; run the same command to resume" if ctx.invoked_subcommand in RESUMED else ""
            typer.echo(f"stopped{again}", err=True)
            raise typer.Exit(130) from error
        except preemption.Preempted as error:
            typer.echo("preempted, and saved; run the same command to resume", err=True)
            raise typer.Exit(preemption.EXIT_CODE) from error


@contextmanager
def _usage_errors(ctx: Any) -> Iterator[None]:
    """Prints errors in the arguments of a group or its command as one line; typer would draw a box."""
    try:
        yield
    except _UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # it has printed the help
            raise
        message = " ".join(error.format_message().split()).rstrip(".")
        command = " ".join(filter(None, (ctx.command_path, ctx.invoked_subcommand)))
        raise _failure(str(AntgmmError(f"{message[:1].lower()}{message[1:]} (see {command} --help)"))) from error


def _failure(message: str, code: int = AntgmmError.exit_code) -> typer.Exit:
    typer.echo(f"error: {printable(message)}", err=True)
    return typer.Exit(code)


app = typer.Typer(
    name="antgmm",
    cls=_Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Example: antgmm demo",
)


@app.callback()
def _antgmm() -> None:
    """Prunes and distils vision-language models: a Hugging Face checkpoint in, a smaller one out."""
    environment()


def environment() -> None:
    """Sets environment variables before jax and transformers are imported; existing ones are kept."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "antgmm-jax" / "xla"
    defaults = {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        # Nothing downloads but `antgmm_jax.io.hub`, and that only for names such as hf:ORG/NAME.
        OFFLINE: os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or "0",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    # JAX reserves 75 % of a GPU's memory; a run has the GPU to itself. With both names JAX finds no GPU.
    if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:
        defaults["XLA_CLIENT_MEM_FRACTION"] = "0.92"
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    if os.environ.get("COLUMNS") == "0":  # of terminals without a width; tables would be empty
        del os.environ["COLUMNS"]
    try:
        os.getcwd()
    except OSError as error:  # transformers and others need one
        raise AntgmmError("the current folder was removed: change to another one") from error
    skip_absent_tpu()
    keep_freed_memory()
    logging.getLogger("absl").setLevel(logging.ERROR)


def _add(group: typer.Typer, commands: Commands) -> None:
    for name, (command, example) in commands.items():
        group.command(name, epilog=f"Example: {example}")(command)


def _add_group(name: str, about: str, example: str, commands: Commands) -> None:
    group = typer.Typer(cls=_Group, no_args_is_help=True, help=about, epilog=f"Example: {example}")
    group.callback()(lambda: None)  # with a callback, a group can have a single command
    _add(group, commands)
    app.add_typer(group, name=name)


_COMMANDS: Commands = (
    runs.COMMANDS
    | models.COMMANDS
    | vocabulary.COMMANDS
    | packages.COMMANDS
    | serving.COMMANDS
    | scores.COMMANDS
    | search.COMMANDS
    | plan.COMMANDS
)
_add(app, {name: _COMMANDS[name] for name in SHOWN})
_add_group("data", "Create data sets.", "antgmm data maad --tier s --split test --out maad-s", data.COMMANDS)
_add_group("lab", "Measure: speed, energy, studies of recipes.", "antgmm lab bench --quick", lab.COMMANDS)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line.

    Args:
        arguments: arguments instead of those of the process.
    """
    try:
        with disk_errors("standard output"):
            app(args=None if arguments is None else list(arguments), prog_name="antgmm")
    except AntgmmError as error:  # of help, which is printed before a command begins
        sys.exit(_failure(str(error)).exit_code)


if __name__ == "__main__":
    main(sys.argv[1:])
