"""A run's folder: one recipe, stages, export, report; opened by one run at a time."""

import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from antgmm_jax.errors import AntgmmError
from antgmm_jax.io import checkpoint
from antgmm_jax.io.folders import new_file
from antgmm_jax.parallel.processes import by_first, first
from experiments.run.host.energy import Energy, total
from experiments.run.schema import Recipe, Training
from experiments.run.schema.recipe import difference, dump_recipe, load_recipe, load_training

RECIPE, STATUS, INPUTS = "recipe.toml", "status.json", "inputs.json"
BEAT = 15.0
"""Seconds between two notes of time and energy: what a killed process loses of them."""
WHOLE = "run"
"""Names the energy of all that is done while the folder is open."""


class InUse(AntgmmError):
    """Another process holds a run's folder."""


class RunFolder:
    """Paths of a run.

    Args:
        path: the folder.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.export, self.report, self.cache = self.path / "export", self.path / "report", self.path / "cache"
        self.inputs = self.path / INPUTS
        self._before, self._began = 0.0, time.monotonic()
        self._meters: dict[str, Callable[[], Energy]] = {}

    @property
    def seconds(self) -> float:
        """Wall time of the run: of this process since it named the folder, and of all that held it before."""
        return self._before + time.monotonic() - self._began

    @property
    def energy(self) -> dict[str, Energy]:
        """Energy of the run, under `WHOLE`, and of its parts, of all processes that held it: name -> energy."""
        return {part: read() for part, read in [*self._meters.items()]}

    @contextmanager
    def metered(self, part: str) -> Iterator[Callable[[], Energy]]:
        """Counts the energy of a part of the run; what earlier processes have spent on it counts in.

        Args:
            part: its name.

        Yields:
            read(): the energy of all that was done for it so far.
        """
        from experiments.run.host.metering import metered  # an extra's, and not every user of a folder counts energy

        earlier = [self._meters[part]()] if part in self._meters else []
        with metered() as read:
            self._meters[part] = lambda: total([*earlier, read()])
            yield self._meters[part]

    def stage(self, number: int, name: str) -> Path:
        """Folder of a finished stage, counted from 1."""
        return self.path / "stages" / f"{number:02d}-{name}"

    def steps(self, number: int, name: str) -> Path:
        """Folder of the step checkpoints of a stage that is not finished."""
        return self.path / "steps" / f"{number:02d}-{name}"

    def finished(self, number: int, name: str) -> bool:
        """Whether a stage is complete; step checkpoints that it has left behind are then removed.

        Args:
            number: its place, counted from 1.
            name: its name.

        Raises:
            AntgmmError: its folder is there but damaged.
        """
        done = self.stage(number, name)
        if not checkpoint.is_complete(done):
            if done.exists():
                raise AntgmmError(f"{done} is damaged: remove it and start again")
            return False
        checkpoint.discard_steps(self.steps(number, name))
        return True

    def _write_status(self, state: str, **more: Any) -> None:
        energy = {part: found._asdict() for part, found in self.energy.items()}
        write_json(self.path / STATUS, {"state": state, "seconds": self.seconds, "energy": energy, **more})

    def _recall(self) -> None:
        """Takes up the time and energy that earlier processes took, as far as they came to note them."""
        try:
            status = json.loads((self.path / STATUS).read_text())
            self._before = status["seconds"]
            self._meters = {part: partial(Energy, **found) for part, found in status["energy"].items()}
        except (OSError, ValueError, KeyError):
            return

    @contextmanager
    def _counted(self) -> Iterator[None]:
        """Notes time and energy again and again, for a process that is killed has no last word."""
        done = threading.Event()

        def note() -> None:
            # A full disk is told by whoever has something to save.
            with suppress(AntgmmError):
                self._write_status("running")

        def beat() -> None:
            while not done.wait(BEAT):
                note()

        thread = threading.Thread(target=beat, daemon=True)
        self._recall()
        with self.metered(WHOLE):
            self._write_status("running")
            thread.start()
            try:
                yield
            finally:
                done.set()
                thread.join()
                note()

    @contextmanager
    def opened(self, recipe: Recipe | Training) -> Iterator[None]:
        """Holds the folder for this recipe and this run; status.json says `running`, then `complete` or `failed`.

        Where several processes make the run, the first one holds it for all.

        Args:
            recipe: the run's.

        Raises:
            AntgmmError: the folder is another recipe's or holds something else.
            InUse: another process has it.
        """
        with ExitStack() as stack:
            by_first(lambda: stack.enter_context(self._held(recipe)))
            yield

    @contextmanager
    def _held(self, recipe: Recipe | Training) -> Iterator[None]:
        self._check(recipe)
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.path / ".lock", timeout=0):
                self._check(recipe)
                if not (self.path / RECIPE).exists():
                    write_text(self.path / RECIPE, dump_recipe(recipe))
                try:
                    with self._counted():
                        yield
                except AntgmmError as error:
                    self._write_status("failed", error=str(error))
                    raise
                self._write_status("complete")
        except Timeout as error:
            raise InUse(f"{self.path} is in use by another process: wait for it or choose another folder") from error

    def check(self, recipe: Recipe | Training) -> None:
        """Refuses a folder that is another recipe's or no run; writes nothing.

        Args:
            recipe: the run's.

        Raises:
            AntgmmError: says what the folder is.
        """
        by_first(lambda: self._check(recipe))

    def bind(self, **digests: str) -> None:
        """Notes what the run reads, or refuses to go on with something else: stages of both would not fit together.

        Args:
            digests: of the teacher, the data: whatever a path in the recipe stands for.

        Raises:
            AntgmmError: the folder was begun with another.
        """
        by_first(lambda: self._bind(digests))

    def _bind(self, digests: dict[str, str]) -> None:
        before = json.loads(self.inputs.read_text()) if self.inputs.exists() else digests
        if other := [name for name, digest in digests.items() if before.get(name) != digest]:
            raise AntgmmError(f"{self.path} was begun with another {other[0]}: choose another folder or remove it")
        write_json(self.inputs, digests)

    def _check(self, recipe: Recipe | Training) -> None:
        own = self.path / RECIPE
        if own.exists():
            load = load_recipe if isinstance(recipe, Recipe) else load_training
            try:
                before = load(own)
            except AntgmmError as error:
                fault = str(error).partition("; ")[0]
                raise AntgmmError(
                    f"{self.path} was begun by another command or version ({fault}): finish it with that one, or"
                    " choose another folder"
                ) from None
            if found := difference(before, recipe):
                raise AntgmmError(
                    f"{self.path} is a run of another recipe ({found}): choose another folder or remove it"
                )
        elif self.path.exists() and any(not _hidden(name) for name in os.listdir(self.path)):
            raise AntgmmError(f"{self.path} is not empty and not a run: choose another folder")


def _hidden(name: str) -> bool:
    """Whether a name is of ours and stands for nothing yet: the lock, or what a killed process was writing."""
    return name == ".lock" or (name.startswith(".") and name.endswith(".tmp"))


@contextmanager
def held(place: Path) -> Iterator[None]:
    """Holds what several runs share: the second to come waits; processes of one run go in together.

    Args:
        place: file or folder; the lock lies beside it.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(place.with_suffix(".lock")) if first() else nullcontext():
        yield


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file under a temporary name and renames it."""
    with new_file(path) as partial:
        partial.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 under a temporary name and renames it."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes JSON under a temporary name and renames it."""
    write_text(path, json.dumps(value, indent=1, default=float) + "\n")
