"""The start of a run: devices, folder, copy in a store, and what its errors say."""

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import typer

from antgmm_jax.errors import AntgmmError

if TYPE_CHECKING:
    from experiments.run.progress.watching import Watch
    from experiments.run.schema import Recipe, Training


class Machine(NamedTuple):
    """Devices and processes of a run: arguments of `experiments.run.host.meshes.devices`."""

    mesh: str
    coordinator: str
    processes: int
    process: int


class Options(NamedTuple):
    """Options of a run that do not change its result.

    Attributes:
        machine: devices and processes.
        mirror: URL of its copy in a store; "" for none.
        logs: names of logs for metrics.
        profile: steps to trace.
    """

    machine: Machine
    mirror: str = ""
    logs: list[str] | None = None
    profile: str = ""


def check_options(run: Path, options: Options) -> tuple[tuple[str, ...], range]:
    """Checks options before anything is computed.

    Args:
        run: folder of the run.
        options: the options.

    Returns:
        Names of the logs, and the steps to profile.

    Raises:
        AntgmmError: an option is invalid, or the folder is none that a run can have.
    """
    from antgmm_jax.io.stores import is_url
    from experiments.run.files import nearest
    from experiments.run.host.logs import check_logs
    from experiments.run.host.tracing import parse_steps

    if is_url(run):
        raise AntgmmError(f"--run {run}: a run works in a folder; use --run DIR --mirror URL")
    if run.exists() and not run.is_dir():
        raise AntgmmError(f"--run {run} is a file: name a folder")
    place = nearest(run.absolute())
    if not os.access(place, os.W_OK):
        raise AntgmmError(f"--run {run}: {place} cannot be written; choose another folder")
    logs, profile = tuple(options.logs or ()), parse_steps(options.profile)
    check_logs(logs)
    return logs, profile


@contextmanager
def started(run: Path, options: Options, recipe: "Recipe | Training | None" = None) -> Iterator["Watch"]:
    """A context with the requested devices, the folder of the run and its copy in a store; yields what to report.

    Args:
        run: folder of the run.
        options: the options.
        recipe: as in `experiments.run.mirror.mirrored`.

    Raises:
        AntgmmError: as in `check_options`, or devices or copy cannot be had.
    """
    from antgmm_jax.parallel.processes import is_first, run_on_first
    from experiments.run.host.meshes import devices
    from experiments.run.mirror import mirrored

    logs, profile = check_options(run, options)
    with devices(*options.machine), _in_folder(run) if is_first() else nullcontext(), ExitStack() as stack:
        run_on_first(lambda: stack.enter_context(mirrored(run, options.mirror, recipe)))
        yield _watch(logs, profile)


def _watch(logs: Sequence[str], profile: range) -> "Watch":
    """What to report, with the peak of the devices of this run."""
    import jax

    from experiments.lab.planning.chips import published
    from experiments.run.progress.watching import Watch

    chip = published(jax.devices()[0].device_kind)
    return Watch(logs, profile, chip.flops if chip else 0.0)


@contextmanager
def _in_folder(run: Path) -> Iterator[None]:
    """On errors, removes the folder of a run that has saved nothing, or says how to resume the run."""
    existed = run.exists()
    try:
        yield
    except AntgmmError as error:
        from distill import Diverged
        from experiments.run.folder import remove_unsaved

        if (not existed and remove_unsaved(run)) or isinstance(error, Diverged):  # the same command would diverge again
            raise
        if (run / "status.json").exists() and state_of(run).endswith(f": {error})"):
            typer.echo(f"{run} is kept; fix the error and run the same command to resume", err=True)
        raise


def state_of(run: Path) -> str:
    """Returns the state of a run in brackets; "" if it has none."""
    from experiments.run.folder import status_of

    try:
        status = status_of(run)
    except AntgmmError:
        return ""
    return f" (it is {status['state']}{': ' + status['error'] if status.get('error') else ''})"
