"""Metrics of a run for TensorBoard, W&B and trackio."""

import importlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from antgmm_jax.errors import AntgmmError
from antgmm_jax.extras import require

LOGS = ("tensorboard", "wandb", "trackio")
PROJECT = "antgmm-jax"
"""Project of runs in W&B and trackio; their environment variables set everything else."""


class Log(Protocol):
    """A place for metrics."""

    def write(self, stage: str, step: int, total: int, values: Mapping[str, float]) -> None:
        """Writes the metrics of a step.

        Args:
            stage: name of the stage.
            step: steps of the stage, including this one.
            total: steps of the run, including this one.
            values: name -> value.
        """
        ...

    def close(self) -> None:
        """Writes what is still in memory."""
        ...


def check_logs(names: Sequence[str]) -> None:
    """Checks that the packages of logs are installed, without importing them.

    Args:
        names: names in `LOGS`.

    Raises:
        AntgmmError: names an unknown log, or the package to install.
    """
    for name in names:
        if name not in LOGS:
            raise AntgmmError(f"--log {name}: choose from {', '.join(LOGS)}")
        if name == "tensorboard":
            require("tensorboard")
        elif find_spec(name) is None:
            raise AntgmmError(f"--log {name} needs {name}: pip install {name}")


@contextmanager
def open_logs(names: Sequence[str], run: Path, config: Mapping[str, Any]) -> Iterator[list[Log]]:
    """Opens logs, and closes them at the end of the context.

    Args:
        names: as in `check_logs`.
        run: folder of the run.
        config: recipe of the run as JSON types.

    Yields:
        The logs.

    Raises:
        AntgmmError: a log cannot be opened, for example without a login.
    """
    with ExitStack() as stack:
        logs = []
        for name in names:
            log = TensorBoard(run / "metrics") if name == "tensorboard" else Tracker(name, run, config)
            stack.callback(log.close)
            logs.append(log)
        yield logs


class TensorBoard:
    """Event files, a folder for each stage; `tensorboard --logdir RUN/metrics` shows them.

    Args:
        folder: folder of the files.
    """

    def __init__(self, folder: Path):
        self._folder, self._writers = folder, {}

    def write(self, stage: str, step: int, total: int, values: Mapping[str, float]) -> None:
        """Writes the metrics of a step; those of an earlier process after the first step are hidden."""
        if stage not in self._writers:
            from tensorboardX import SummaryWriter

            self._writers[stage] = SummaryWriter(str(self._folder / stage), purge_step=step, filename_suffix=f".{step}")
        for name, value in values.items():
            self._writers[stage].add_scalar(name, value, step)

    def close(self) -> None:
        """Writes the files."""
        for writer in self._writers.values():
            writer.close()


class Tracker:
    """W&B, or trackio, which has the same functions.

    Args:
        name: package to use.
        run: folder of the run; its name is that of the run.
        config: recipe of the run.

    Raises:
        AntgmmError: the package refuses to start a run.
    """

    def __init__(self, name: str, run: Path, config: Mapping[str, Any]):
        self._library: ModuleType = importlib.import_module(name)
        try:
            self._library.init(project=PROJECT, name=run.resolve().name, config=dict(config), resume="allow")
        except Exception as error:  # each package has its own
            reason = " ".join(str(error).split())[:160] or type(error).__name__
            raise AntgmmError(f"--log {name}: {reason}; correct this, or leave out --log {name}") from error

    def write(self, stage: str, step: int, total: int, values: Mapping[str, float]) -> None:
        """Writes the metrics of a step under `STAGE/NAME`."""
        self._library.log({f"{stage}/{name}": value for name, value in values.items()}, step=total)

    def close(self) -> None:
        """Sends what is still in memory."""
        self._library.finish()
