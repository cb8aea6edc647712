"""A copy of a run in an object store: a new machine without the folder of the run continues from it.

The folder is the run; the copy follows it. It holds the recipe, finished stages, step checkpoints, the export and the
report. The record of a stage or step is written after its arrays, so that one without a record is incomplete.
"""

import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from itertools import groupby
from pathlib import Path

from antgmm_jax.errors import AntgmmError
from antgmm_jax.io import stores
from antgmm_jax.io.checkpoint import STAGE_RECORD, STEP_RECORD
from antgmm_jax.io.stores import Store
from experiments.run.folder import INPUTS, RECIPE, RunFolder
from experiments.run.host.console import say
from experiments.run.schema import Recipe, Training
from experiments.run.status import STATUS

EVERY = 10.0
"""Seconds between copies of what is new."""
TRIES = 3
"""Attempts at the end of a run."""
_BOOKS = (RECIPE, INPUTS, STATUS)
_RECORDS = (STAGE_RECORD, STEP_RECORD)
_RESUMED = ("stages/", "steps/")
_COPIED = ("stages", "steps", "export", "export-*", "report")
"""Patterns of the folders that are copied; quantized exports are in `export-SCHEME`."""


@contextmanager
def mirrored(run: Path, url: str, recipe: Recipe | Training | None = None) -> Iterator[None]:
    """Continues a run from its copy in a store, and keeps the copy up to date inside the context.

    A store that is out of reach does not stop the run; at its end the copy must succeed.

    Args:
        run: folder of the run.
        url: URL of the copy; "" for none.
        recipe: recipe of the run, with which the copy is compared before its stages are fetched; None if it is made
            later.

    Raises:
        AntgmmError: the store cannot be read at the start or written at the end, or the copy is that of another recipe.
    """
    if not url:
        yield
        return
    copy = _Copy(run, stores.opened(url))
    copy.fetch(recipe)
    thread = threading.Thread(target=copy.follow, daemon=True)
    thread.start()
    try:
        yield
    except BaseException:
        _end(copy, thread)
        copy.attempt(last=True)
        raise
    _end(copy, thread)
    copy.finish()


def _end(copy: "_Copy", thread: threading.Thread) -> None:
    copy.over.set()
    thread.join()


class _Copy:
    """The copy of a run.

    Args:
        run: folder of the run.
        store: folder of the copy.

    Attributes:
        over: set at the end of the run, after which only the last copy is made.
    """

    def __init__(self, run: Path, store: Store):
        self._run, self._store = run, store
        self._sent: dict[str, tuple[int, int]] = {}
        self._made_elsewhere: set[str] = set()
        self._failing = False
        self.over = threading.Event()

    def fetch(self, recipe: Recipe | Training | None) -> None:
        """Copies the stages and steps that the folder lacks from the store, unless they are of another recipe."""
        stored = [*self._store.files()]
        mine = self._run / RECIPE
        if RECIPE in stored and mine.exists() and self._store.read_text(RECIPE) != mine.read_text(encoding="utf-8"):
            raise AntgmmError(
                f"{self._store.url} is the copy of a run of another recipe than {self._run}: choose another URL"
            )
        records = [name for name in stored if name.startswith(_RESUMED) and _is_record(name)]
        # A folder without its record is what an interrupted copy has left.
        missing = [str(Path(name).parent) for name in records if self._lacks(name, records)]
        if missing:
            # Of another machine: they stay until this one has made its own.
            folders = {_unit(name) for name in stored if not name.startswith(_RESUMED)}
            self._made_elsewhere = {folder for folder in folders if not (self._run / folder).exists()}
            say(f"continuing from {self._store.url}: {', '.join(missing)}")
        if records:  # the books first: stages without a record of their inputs are refused
            self._store.get([name for name in _BOOKS if name in stored and not (self._run / name).exists()], self._run)
            if recipe is not None:
                RunFolder(self._run).check_alone(recipe)
        for unit in missing:
            files = [name for name in stored if name.startswith(f"{unit}/")]
            self._store.get(sorted(files, key=_is_record), self._run)
        with suppress(AntgmmError, OSError):  # what cannot be compared is copied again
            self._sent = self._shared({*stored}, records)

    def _shared(self, stored: Collection[str], records: Collection[str]) -> dict[str, tuple[int, int]]:
        """The files of stages and steps that are the same here and in the store: records hold all checksums."""
        same = {
            _unit(name)
            for name in records
            if (mine := self._run / name).exists() and mine.read_bytes() == self._store.read_text(name).encode()
        }
        return {name: state for name, state in self._present().items() if name in stored and _unit(name) in same}

    def _lacks(self, record: str, records: Collection[str]) -> bool:
        """Whether the folder needs the stage or step of a stored record; not an old step that it has removed."""
        kind, stage, *step = Path(record).parts[:-1]
        if (self._run / record).exists():
            return False
        if not step:
            return True
        done = f"stages/{stage}/{STAGE_RECORD}"
        newer = any(one.parent.name > step[0] for one in (self._run / kind / stage).glob(f"*/{STEP_RECORD}"))
        return not (newer or done in records or (self._run / done).exists())

    def follow(self) -> None:
        """Copies what is new every `EVERY` seconds until `over` is set."""
        while not self.over.wait(EVERY):
            self.attempt()

    def attempt(self, last: bool = False) -> bool:
        """Copies what is new; prints the first error of a series, and returns whether there was none."""
        try:
            whole = self.send(last)
        except FileNotFoundError:  # an old step was removed meanwhile
            return False
        except (AntgmmError, OSError) as error:
            if not self._failing:
                say(f"{error}; the run goes on in {self._run}, and its copy follows as soon as this works")
            self._failing = True
            return False
        self._failing = False
        return whole

    def finish(self) -> None:
        """Copies what is new, with several attempts."""
        for _ in range(TRIES - 1):
            if self.attempt(last=True):
                return
        try:
            self.send(last=True)
        except AntgmmError as error:
            raise AntgmmError(f"{error}; {self._run} is complete: run the same command again to copy it") from error

    def send(self, last: bool) -> bool:
        """Copies new files of the folder, and removes those from the store that the folder no longer has.

        Exports and reports that another machine has made stay where this one has none.

        Args:
            last: whether to copy a new state of the run even if nothing else is new.

        Returns:
            Whether all of it is copied; not if the run has removed an old step or ended meanwhile.
        """
        present = self._present()
        new = [name for name, state in present.items() if self._sent.get(name) != state]
        if not any(name.startswith(_RESUMED) for name in present) or not (last or {*new} - {*_BOOKS}):
            return True
        whole = True
        for _, names in groupby(sorted(new, key=_turn), key=_unit):
            if self.over.is_set() and not last:  # the last copy begins with the newest step
                return False
            whole = self._put(sorted(names, key=_is_record), present) and whole
        kept = self._made_elsewhere - {*map(_unit, present)}
        stored = [name for name in self._store.files() if _is_copied(name) and name not in present]
        gone = [name for name in stored if _unit(name) not in kept]
        self._store.remove(sorted(gone, key=lambda name: not _is_record(name)))
        for name in gone:
            self._sent.pop(name, None)
        return whole

    def _put(self, names: Sequence[str], present: Mapping[str, tuple[int, int]]) -> bool:
        """Copies files in the given order; returns whether the folder still had all of them."""
        try:
            for name in names:
                self._store.put(self._run, [name])
                self._sent[name] = present[name]
        except FileNotFoundError:  # an old step was removed meanwhile; newer ones are copied
            return False
        return True

    def _present(self) -> dict[str, tuple[int, int]]:
        """The files of the folder to copy: relative path -> size and time."""
        paths = [self._run / name for name in _BOOKS]
        paths += [path for part in _COPIED for path in self._run.glob(f"{part}/**/*")]
        names = {path.relative_to(self._run).as_posix(): path for path in paths if path.is_file()}
        shown = {name: path.stat() for name, path in names.items() if not any(p[0] == "." for p in name.split("/"))}
        return {name: (status.st_size, status.st_mtime_ns) for name, status in shown.items()}


def _is_copied(name: str) -> bool:
    return any(fnmatchcase(name.partition("/")[0], part) for part in _COPIED)


def _unit(name: str) -> str:
    """What is complete once its record is copied: a stage, or a step checkpoint of one; else the name of the folder."""
    kind, *rest = name.split("/")[:-1] or [""]
    return "/".join([kind, *rest[: {"stages": 1, "steps": 2}.get(kind, 0)]])


def _turn(name: str) -> tuple[int, list[int], str]:
    """Place of a file in the order of copying: books, finished stages, step checkpoints from the newest, the rest."""
    unit = _unit(name)
    kind, *rest = unit.split("/")
    order = {"": 0, "stages": 1, "steps": 2}.get(kind, 3)
    return order, [-int(part) for part in rest[1:] if part.isdecimal()], unit


def _is_record(name: str) -> bool:
    return Path(name).name in _RECORDS
