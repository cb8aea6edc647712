"""A run's folder: one recipe, stages, export, report; opened by one run at a time."""

import json
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from antgmm_jax import checkpoint
from antgmm_jax.errors import AntgmmError
from antgmm_jax.processes import by_first
from experiments.recipe import difference, dump_recipe, load_recipe, load_training
from experiments.schema import Recipe, Training

RECIPE, STATUS = "recipe.toml", "status.json"
BEAT = 15.0
"""Seconds between two notes of the time taken: what a killed process loses of it."""


class RunFolder:
    """Paths of a run.

    Args:
        path: the folder.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.export, self.report, self.cache = self.path / "export", self.path / "report", self.path / "cache"
        self._before, self._began = 0.0, time.monotonic()

    @property
    def seconds(self) -> float:
        """Wall time of the run: of this process since it named the folder, and of all that held it before."""
        return self._before + time.monotonic() - self._began

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
        write_json(self.path / STATUS, {"state": state, "seconds": self.seconds, **more})

    def _earlier(self) -> float:
        """Seconds that earlier processes took, as far as they came to note them."""
        try:
            return json.loads((self.path / STATUS).read_text())["seconds"]
        except (OSError, ValueError, KeyError):
            return 0.0

    @contextmanager
    def _counted(self) -> Iterator[None]:
        """Notes the time taken again and again, for a process that is killed has no last word."""
        done = threading.Event()

        def note() -> None:
            # A full disk is told by whoever has something to save.
            with suppress(AntgmmError):
                self._write_status("running")

        def beat() -> None:
            while not done.wait(BEAT):
                note()

        thread = threading.Thread(target=beat, daemon=True)
        self._before = self._earlier()
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
            AntgmmError: the folder is another recipe's, holds something else, or another process has it.
        """
        with ExitStack() as held:
            by_first(lambda: held.enter_context(self._held(recipe)))
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
            raise AntgmmError(
                f"{self.path} is in use by another process: wait for it or choose another folder"
            ) from error

    def check(self, recipe: Recipe | Training) -> None:
        """Refuses a folder that is another recipe's or no run; writes nothing.

        Args:
            recipe: the run's.

        Raises:
            AntgmmError: says what the folder is.
        """
        by_first(lambda: self._check(recipe))

    def _check(self, recipe: Recipe | Training) -> None:
        own = self.path / RECIPE
        if own.exists():
            load = load_recipe if isinstance(recipe, Recipe) else load_training
            if found := difference(load(own), recipe):
                raise AntgmmError(
                    f"{self.path} is a run of another recipe ({found}): choose another folder or remove it"
                )
        elif self.path.exists() and set(os.listdir(self.path)) - {".lock"}:
            raise AntgmmError(f"{self.path} is not empty and not a run: choose another folder")


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file under a temporary name and renames it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise AntgmmError(f"{path} could not be written ({error.strerror}): free disk space and start again") from error


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 under a temporary name and renames it."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes JSON under a temporary name and renames it."""
    write_text(path, json.dumps(value, indent=1, default=float) + "\n")
