"""The folder of a run: recipe, stages, export and report; only one process may open it at a time."""

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from itertools import takewhile
from pathlib import Path
from typing import Any

import jax
from filelock import FileLock, Timeout

from antgmm_jax.errors import AntgmmError, disk_errors
from antgmm_jax.io import checkpoint, folders
from antgmm_jax.io.books import read_book, write_book
from antgmm_jax.parallel.preemption import Preempted
from antgmm_jax.parallel.processes import check_equal, is_first, run_on_first
from experiments.run.files import write_text
from experiments.run.pins import Given, pinned
from experiments.run.schema import Recipe, Training
from experiments.run.schema.recipe import as_parent, difference, dump_recipe, load_recipe, load_training
from experiments.run.status import STATUS, Status

RECIPE, INPUTS, LOCK, REPORT = "recipe.toml", "inputs.json", ".lock", "report.json"
_ELSEWHERE = "choose another folder or remove it, and with --mirror another URL"
_LOST = 120
"""Seconds for which the first of several processes waits for the lock."""


class InUse(AntgmmError):
    """The folder of the run is in use by another process."""


class RunFolder:
    """Paths, lock and status of a run.

    Args:
        path: folder of the run.

    Attributes:
        status: state, time and energy of the run.
        gate: result of the export gate, written after the export.
        checksums: checksums of the export's files but for the model card.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.export, self.report, self.cache = self.path / "export", self.path / "report", self.path / "cache"
        self.inputs = self.path / INPUTS
        self.gate, self.checksums = self.report / "gate.json", self.report / "export.json"
        self.status = Status(self.path / STATUS, self._check_present)

    def stage(self, number: int, name: str) -> Path:
        """Folder of a finished stage; numbers start at 1."""
        return self.path / "stages" / f"{number:02d}-{name}"

    def steps(self, number: int, name: str) -> Path:
        """Folder of the step checkpoints of an unfinished stage."""
        return self.path / "steps" / f"{number:02d}-{name}"

    def finished(self, number: int, name: str) -> bool:
        """Whether a stage is complete; if so, removes its step checkpoints.

        Args:
            number: position of the stage, from 1.
            name: name of the stage.

        Raises:
            AntgmmError: the folder of the stage is damaged.
        """
        done = self.stage(number, name)
        if not checkpoint.is_complete(done):
            if done.exists():
                raise AntgmmError(f"{done} is damaged: remove it and start again")
            return False
        checkpoint.discard_steps(self.steps(number, name))
        return True

    def _check_present(self) -> None:
        """Raises AntgmmError if the folder was removed since the run began; else writing would create a part of it."""
        if not (self.path / RECIPE).exists():
            raise AntgmmError(f"{self.path} was removed while the run was using it: start the run again")

    def _clean(self) -> None:
        """Removes what a killed process has left half-written or half-removed."""
        for part in (self.path, self.report, self.cache, *(self.path / name for name in ("stages", "steps"))):
            folders.remove_leftovers(part)
        for stage in self.path.glob("steps/*/"):
            folders.remove_leftovers(stage)

    def _note_end(self, state: str, **more: Any) -> None:
        """Writes the status of a run that ends early. An error of the disk must not hide why the run ends."""
        self._check_present()
        with suppress(AntgmmError):
            self.status.write(state, **more)

    @contextmanager
    def opened(self, recipe: Recipe | Training, end: str = "complete") -> Iterator[None]:
        """Locks the folder for a recipe; status.json is `running`, then `end`, `failed`, `preempted` or `stopped`.

        After a kill it stays `running`, with the process that did not end the run; see `status_of`.

        With several processes, the first one locks it for all.

        Args:
            recipe: recipe of the run.
            end: state at the end; "stopped" if the run goes on after it.

        Raises:
            AntgmmError: the folder belongs to another recipe or contains other files.
            InUse: another process has locked it.
        """
        with ExitStack() as stack:
            run_on_first(lambda: stack.enter_context(self._locked(recipe, end)))
            yield

    @contextmanager
    def _locked(self, recipe: Recipe | Training, end: str) -> Iterator[None]:
        self._check(recipe)
        self.path.mkdir(parents=True, exist_ok=True)
        with self.alone():
            self._check(recipe)
            self._clean()
            if not (self.path / RECIPE).exists():
                write_text(self.path / RECIPE, dump_recipe(recipe))
            try:
                with disk_errors(self.path), self.status.running():
                    yield
            except AntgmmError as error:
                self._note_end("failed", error=str(error))
                raise
            except Preempted:
                self._note_end("preempted")
                raise
            except KeyboardInterrupt:
                with suppress(AntgmmError):
                    self.status.write("stopped")
                raise
            self.status.write(end)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Locks the folder, which exists. Raises InUse if another process has locked it."""
        # A file server keeps the lock of a machine that is gone for about 90 s.
        timeout = _LOST if jax.process_count() > 1 else 0
        try:
            lock = FileLock(self.path / LOCK, timeout=timeout).acquire()
        except Timeout as error:
            raise InUse(
                f"{self.path} is in use by another process: wait for it, or choose another folder; remove"
                f" {self.path / LOCK} if its machine is gone"
            ) from error
        with lock:
            yield

    def check(self, recipe: Recipe | Training) -> None:
        """Checks that the folder is new or belongs to the recipe, without writing anything.

        Args:
            recipe: recipe of the run.

        Raises:
            AntgmmError: the folder belongs to another recipe or contains other files.
        """
        check_equal("recipe", dump_recipe(recipe))
        run_on_first(lambda: self._check(recipe))

    def check_alone(self, recipe: Recipe | Training) -> None:
        """As `check`, in a single process: the others may wait for it in `run_on_first`.

        Args:
            recipe: recipe of the run; its Hub names may be without their commits.

        Raises:
            AntgmmError: as in `check` and `pinned`.
        """
        self._check(self.pinned(recipe))

    def check_free(self) -> None:
        """Checks that the folder is new, or belongs to some run.

        Raises:
            AntgmmError: it contains other files.
        """
        names = os.listdir(self.path) if self.path.exists() else []
        if RECIPE not in names and not all(map(_hidden, names)):
            raise AntgmmError(f"{self.path} is not empty and not a run: choose another folder")

    def bind(self, **digests: str) -> None:
        """Records digests of the run's inputs; those that are recorded already are compared.

        Args:
            digests: digests of the inputs, such as `teacher` and `test_rows`.

        Raises:
            AntgmmError: the run was started with other inputs, or has stages without a record of their inputs.
        """
        for name, digest in digests.items():
            check_equal(name.replace("_", " "), digest)
        run_on_first(lambda: self._bind(digests))

    def _bind(self, digests: dict[str, str]) -> None:
        remedy = f"choose another folder, or remove {self.path}"
        if not self.inputs.exists() and any((self.path / part).exists() for part in ("stages", "steps")):
            raise AntgmmError(f"{self.inputs} is missing, so the teacher and data of its stages are unknown: {remedy}")
        before = read_book(self.inputs, remedy) if self.inputs.exists() else {}
        if other := [name for name, digest in digests.items() if before.get(name, digest) != digest]:
            what = other[0].replace("_", " ")
            raise AntgmmError(f"{self.path}: its {what} changed since its start: {_ELSEWHERE}")
        if before != before | digests:
            write_book(self.inputs, before | digests)

    def pinned(self, recipe: Given) -> Given:
        """Returns a recipe with the commits of its Hub names: those of an earlier start, or the current ones.

        Args:
            recipe: recipe of the run.

        Raises:
            AntgmmError: a repository cannot be downloaded, or the folder belongs to another kind of recipe.
        """
        return pinned(recipe, self._stored(recipe))

    def _stored(self, recipe: Recipe | Training) -> Recipe | Training | None:
        """The recipe of an earlier start, of the same kind as `recipe`."""
        path = self.path / RECIPE
        if not path.exists():
            return None
        try:
            return load_recipe(path) if isinstance(recipe, Recipe) else load_training(path)
        except AntgmmError as error:
            reason = str(error).partition("; ")[0]
            raise AntgmmError(
                f"{self.path} was started by another command or version ({reason}): finish it with that one, or"
                " choose another folder"
            ) from None

    def _check(self, recipe: Recipe | Training) -> None:
        before = self._stored(recipe)
        if before is None:
            self.check_free()
        elif changed := difference(before, recipe):
            raise AntgmmError(
                f"{self.path} is a run of another recipe ({changed}): {_ELSEWHERE}{self._reusable(before, recipe)}"
            )

    def _reusable(self, before: Recipe | Training, recipe: Recipe | Training) -> str:
        """What a changed recipe can start from in another folder: the last finished stage before the first change."""
        if not isinstance(recipe, Recipe):
            return ""
        pairs = zip(before.work, recipe.work, strict=False)
        equal = [work for work, _ in takewhile(lambda pair: pair[0].stage == pair[1].stage, pairs)]
        equal = equal[: len(recipe.work) - 1]  # a recipe has stages of its own
        places = [self.stage(work.number, work.stage.name) for work in equal]
        if not (done := [*takewhile(checkpoint.is_complete, places)]):
            return ""
        return f"; in another folder, a recipe that begins after {done[-1].name} may have {as_parent(done[-1])}"


def _hidden(name: str) -> bool:
    """Whether a file is the lock, or a temporary file of a killed process."""
    return name == ".lock" or (name.startswith(".") and name.endswith(".tmp"))


def status_of(path: Path) -> dict[str, Any]:
    """Returns the status of a run: `state` is `stopped` if its process was killed.

    Args:
        path: folder of the run.

    Raises:
        AntgmmError: there is no status, or it is damaged.
    """
    status = read_book(path / STATUS)
    if not isinstance(status.get("state"), str):
        raise AntgmmError(f"{path / STATUS} holds no state: start the run again")
    if status["state"] == "running":
        # On a disk that became read-only, a lock cannot be opened.
        with suppress(Timeout, OSError), FileLock(path / LOCK, timeout=0):
            status["state"] = "stopped"
    return status


def remove_unsaved(path: Path) -> bool:
    """Removes the folder of a run that has saved nothing, unless another process uses it.

    Args:
        path: folder of the run.

    Returns:
        Whether it was removed.
    """
    with suppress(Timeout, OSError):
        if _holds_books_only(path):
            with FileLock(path / LOCK, timeout=0):
                if _holds_books_only(path):
                    shutil.rmtree(path)
                    return True
    return False


def _holds_books_only(path: Path) -> bool:
    return path.exists() and {one.name for one in path.iterdir()} <= {RECIPE, STATUS, INPUTS, LOCK}


@contextmanager
def held(place: Path) -> Iterator[None]:
    """Locks a file or folder that several runs share; other runs wait.

    Args:
        place: file or folder; the lock file is next to it.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(place.with_suffix(".lock")) if is_first() else nullcontext():
        yield
