"""Metrics of a run for TensorBoard, W&B and trackio."""

import importlib
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from antgmm_jax.errors import AntgmmError
from antgmm_jax.extras import require
from experiments.run.host.console import say

LOGS = ("tensorboard", "wandb", "trackio")
PROJECT = "antgmm-jax"
"""Project of runs in W&B and trackio; their environment variables set everything else."""
FLUSH = 30.0
"""Seconds between writes of TensorBoard's files to the disk."""


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
    """Opens logs, and closes them at the end of the context. One that fails after that is given up, with a message.

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
            logs.append(_Dispensable(name, log))
            stack.callback(logs[-1].close)
        yield logs


class _Dispensable:
    """A log that is given up, with a message, at its first error.

    The first process alone has logs: an error that it raised would leave the others waiting for it.
    """

    def __init__(self, name: str, log: Log):
        self._name, self._log, self._failed = name, log, False

    def write(self, stage: str, step: int, total: int, values: Mapping[str, float]) -> None:
        if not self._failed:
            self._attempt(lambda: self._log.write(stage, step, total, values))

    def close(self) -> None:
        self._attempt(self._log.close)

    def _attempt(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # each package has its own
            if not self._failed:
                say(f"warning: the run goes on without --log {self._name}: {_line(error)}")
            self._failed = True


class TensorBoard:
    """Event files, a folder for each stage; `tensorboard --logdir RUN/metrics` shows them.

    Args:
        folder: folder of the files.
    """

    # tensorboardX's `SummaryWriter` writes in a thread: on a full disk the thread ends with a traceback, and the
    # eleventh value waits for it for ever.

    def __init__(self, folder: Path):
        self._folder, self._files, self._flushed = folder, {}, time.monotonic()

    def write(self, stage: str, step: int, total: int, values: Mapping[str, float]) -> None:
        """Writes the metrics of a step; those of an earlier process after the first step are hidden.

        Raises:
            AntgmmError: the disk is full or read-only.
        """
        from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue] - generated
        from tensorboardX.summary import scalar

        with self._errors():
            events = [Event(summary=scalar(name, value)) for name, value in values.items()]
            if stage not in self._files:
                self._files[stage] = self._opened(stage, step)
                start = Event(session_log=SessionLog(status=SessionLog.START))  # hides later steps
                events = [Event(file_version="brain.Event:2"), start, *events]
            for event in events:
                event.wall_time, event.step = time.time(), step
                self._files[stage].write(event.SerializeToString())
            if time.monotonic() - self._flushed > FLUSH:
                self._flush()

    def close(self) -> None:
        """Writes the files.

        Raises:
            AntgmmError: as in `write`.
        """
        files, self._files = self._files, {}
        with self._errors(), ExitStack() as stack:
            for file in files.values():
                stack.callback(file.close)

    def _opened(self, stage: str, step: int) -> Any:
        from tensorboardX.record_writer import RecordWriter

        (self._folder / stage).mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{step}"
        return RecordWriter(str(self._folder / stage / name))

    def _flush(self) -> None:
        self._flushed = time.monotonic()
        for file in self._files.values():
            file.flush()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            remedy = "free disk space and run it again, or leave out --log tensorboard"
            raise AntgmmError(f"cannot write {self._folder}: {error.strerror or error}; {remedy}") from error


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
            raise AntgmmError(f"--log {name}: {_line(error)}; correct this, or leave out --log {name}") from error

    def write(self, stage: str, step: int, total: int, values: Mapping[str, float]) -> None:
        """Writes the metrics of a step under `STAGE/NAME`."""
        self._library.log({f"{stage}/{name}": value for name, value in values.items()}, step=total)

    def close(self) -> None:
        """Sends what is still in memory."""
        self._library.finish()


def _line(error: Exception) -> str:
    """An error as one line; that of a package is shortened, ours is a line with a remedy."""
    if isinstance(error, AntgmmError):
        return str(error)
    return " ".join(str(error).split())[:160] or type(error).__name__
