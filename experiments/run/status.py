"""The status file of a run: its state, and its time and energy over all of its processes."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from os import getpid
from pathlib import Path
from typing import Any

from antgmm_jax.errors import AntgmmError
from antgmm_jax.io.books import read_book, write_book
from experiments.run.host.console import say
from experiments.run.host.energy import Energy, total

STATUS = "status.json"
WHOLE = "run"
"""Key of the energy of the whole run."""
BEAT = 15.0
"""Seconds between updates of time and energy; a killed process loses at most that much."""
_FROM_NOW = "time and energy count from now"


class Status:
    """State, time and energy of a run, of which the file keeps what earlier processes have used.

    Args:
        path: the file.
        check: called before the file is written; raises an `AntgmmError` if it must not be.
    """

    def __init__(self, path: Path, check: Callable[[], None]):
        self._path, self._check = path, check
        self._before, self._began = 0.0, time.monotonic()
        self._meters: dict[str, Callable[[], Energy]] = {}

    @property
    def seconds(self) -> float:
        """Wall time of the run in seconds, including earlier processes."""
        return self._before + time.monotonic() - self._began

    @property
    def energy(self) -> dict[str, Energy]:
        """Energy of the run (`WHOLE`) and of its parts, including earlier processes."""
        return {part: read() for part, read in [*self._meters.items()]}

    @contextmanager
    def metered(self, part: str) -> Iterator[Callable[[], Energy]]:
        """Measures the energy of a part of the run, and adds it to that of earlier processes.

        Args:
            part: name of the part.

        Yields:
            read(): returns the total energy of the part so far.
        """
        from experiments.run.host.metering import metered  # an extra's, and not every user of a folder counts energy

        earlier = [self._meters[part]()] if part in self._meters else []
        with metered() as read:
            self._meters[part] = lambda: total([*earlier, read()])
            yield self._meters[part]

    def write(self, state: str, **more: Any) -> None:
        """Writes the file.

        Args:
            state: state of the run, such as "running".
            more: further entries.

        Raises:
            AntgmmError: it cannot be written, or `check` refuses.
        """
        self._check()
        more |= {"host": socket.gethostname(), "process": getpid()} if state == "running" else {}
        energy = {part: used._asdict() for part, used in self.energy.items()}
        write_book(self._path, {"state": state, "seconds": self.seconds, "energy": energy, **more})

    @contextmanager
    def running(self) -> Iterator[None]:
        """Counts on from earlier processes, and writes the file periodically, so that a kill loses little."""
        done = threading.Event()

        def note() -> None:
            # Ignore a full disk here: saving something important will report it.
            with suppress(AntgmmError):
                self.write("running")

        def beat() -> None:
            while not done.wait(BEAT):
                note()

        thread = threading.Thread(target=beat, daemon=True)
        self._recall()
        with self.metered(WHOLE):
            self.write("running")
            thread.start()
            try:
                yield
            finally:
                done.set()
                thread.join()
                note()

    def _recall(self) -> None:
        """Loads time and energy of earlier processes."""
        if not self._path.exists():
            return
        try:
            status = read_book(self._path, _FROM_NOW)
            seconds = float(status["seconds"])
            energy = {part: Energy(**used) for part, used in status["energy"].items()}
        except AntgmmError as error:
            say(str(error))
            return
        except (KeyError, TypeError, ValueError, AttributeError):
            say(f"{self._path} holds no time and energy: {_FROM_NOW}")
            return
        self._before = seconds
        self._meters = {part: partial(Energy._make, used) for part, used in energy.items()}
