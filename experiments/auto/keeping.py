"""The smallest student that keeps a share of the teacher's score: a search of runs in one folder, which can be resumed.

The folder has a plan `N.toml` and a run `N` for each student, caches that they share, and `search.json`.
"""

import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from math import inf
from pathlib import Path
from typing import Any

from rich.table import Table

import pruning
from antgmm_jax.errors import AntgmmError
from antgmm_jax.io import folders
from antgmm_jax.io.books import read_book, write_book
from distill import Diverged
from experiments.auto.bisection import Tried, between, next_ratio, smallest_kept
from experiments.auto.goal import MOST_MINUTES, PARTS, Goal, stage_of
from experiments.auto.plan import further, measured, write
from experiments.auto.schedule import Tuned
from experiments.lab.planning.search import NoLegalModel
from experiments.report.choices import SEARCH
from experiments.run.export.publishing import check_replaceable
from experiments.run.folder import REPORT
from experiments.run.host.console import CONSOLE, clock, count, say, table
from experiments.run.pipeline import Run
from experiments.run.progress.watching import Watch
from experiments.run.schema.recipe import load_recipe, read_toml
from experiments.run.student import whole
from pruning.costs import total_parameters

_UNFINISHED = {"1.toml", "tuning"}
"""What a plan that was stopped has left."""


class Search:
    """A search for the smallest student.

    Args:
        goal: the goal, with `keep`.
        path: folder of the search.
        changes: changes of the recipes, as in `load_recipe`.
        watch: what to report about the steps.

    Attributes:
        tries: students so far.
        teacher: score of the teacher; 0 before the first student.

    Raises:
        AntgmmError: the folder is the search of another goal, or something else.
    """

    def __init__(self, goal: Goal, path: Path, changes: Sequence[str], watch: Watch):
        self.goal, self.path, self._changes, self._watch = goal, path, changes, watch
        self._minutes = goal.minutes or MOST_MINUTES
        self._teacher = whole(goal.model).config
        self._params = total_parameters(self._teacher)
        self._book = path / SEARCH
        self.tries: list[Tried] = []
        self.teacher, self._spent, self._tuned = 0.0, 0.0, Tuned()
        if self._book.exists():
            self._recall()
        elif path.exists() and {one.name for one in path.iterdir() if not one.name.startswith(".")} - _UNFINISHED:
            raise AntgmmError(f"{path} is not empty and no search: choose another --run")

    def plan(self) -> Path:
        """Plans the first student, unless that is done, and returns the file of its recipe.

        Raises:
            AntgmmError: invalid rows, or no smaller legal model.
        """
        path = self._recipe(1)
        if self._book.exists():
            self._recall()  # what another process may have done since this object was made
        else:
            begin, tuning = time.monotonic(), self.path / "tuning"
            shutil.rmtree(tuning, ignore_errors=True)
            budget = round(self._params / next_ratio([], self._largest()))
            goal = self._goal(budget)
            try:
                plan = measured(goal, tuning)
            except NoLegalModel as error:  # legal sizes that these rows cannot train were left out
                raise AntgmmError(f"{error}, as --params without --keep-quality") from error
            write(plan, goal, path)
            self._spent, self._tuned = time.monotonic() - begin, plan.tuned
            self._save()
        return path

    def run(self) -> Run:
        """Trains students until the search is over or the time is spent, and prints all of them.

        Returns:
            The run of the smallest student that keeps the quality, with finished stages.

        Raises:
            AntgmmError: no student keeps it.
        """
        self.plan()
        largest, legal = self._largest(), True
        while (ratio := next_ratio(self.tries, largest)) and self._in_time():
            budget = round(self._params / ratio)
            legal = self._planned(budget)
            if not legal:
                say("search: there is no legal size between those that were tried")
                break
            self._try(budget)
        CONSOLE.print(self._table())
        best = smallest_kept(self.tries)
        if not best:
            raise AntgmmError(self._lost(legal and bool(next_ratio(self.tries, largest))))
        return self._run(best)

    def figures(self) -> list[dict[str, Any]]:
        """Returns all students as JSON types."""
        return [one._asdict() for one in self.tries]

    def _table(self) -> Table:
        return table(["student", "parameters", "smaller", "exact match", "of the teacher's", "time", ""], self._rows())

    def _rows(self) -> Iterator[tuple[str, ...]]:
        best = smallest_kept(self.tries)
        for number, one in enumerate(self.tries, 1):
            share = f"{one.score / self.teacher:.1%}" if self.teacher else "-"
            mark = "smallest" if number == best else "kept" if one.kept else "lost"
            figures = f"{one.ratio:.1f}x", f"{one.score:.3f}", share, clock(one.seconds), mark
            yield str(number), count(one.params), *figures

    def publish(self, best: Run) -> None:
        """Copies export and report of a student to the folder of the search, unless they are there.

        A report of another student that is there goes, also if this student has none. A line says if the exported files
        score less than they should, according to the report.

        Args:
            best: run of the student.

        Raises:
            AntgmmError: the folder `export` holds a file that is not of an export.
        """
        for source in (best.folder.export, best.folder.report):
            target = self.path / source.name
            if not source.exists() or (target.exists() and folders.checksums(source) == folders.checksums(target)):
                continue
            if source == best.folder.export:
                check_replaceable(target)
            with folders.temporary_folder(target) as place:
                if source == best.folder.report and target.exists():  # with what others have put there
                    _copy(target, place / source.name)
                copied = _copy(source, place / source.name)
                if not (best.folder.report / REPORT).exists():
                    _forget_report(copied)
                folders.replace(copied, target)
        if (best.folder.report / REPORT).exists():
            for line in rounded_below(self.goal.keep, read_book(best.folder.report / REPORT)):
                say(line)

    def _planned(self, budget: int) -> bool:
        """Plans the next student, unless that is done; returns whether there is a legal one."""
        number, best = len(self.tries) + 1, smallest_kept(self.tries)
        path = self._recipe(number)
        if path.exists():
            return True
        parent = self._last_stage(best) if best else ""
        goal = self._goal(budget)
        begin = time.monotonic()
        try:
            plan = further(goal, read_toml(self._recipe(1), "recipe"), self._tuned, parent, self.path)
        except NoLegalModel as error:
            say(f"search: {error}")
            return False
        self._spent += time.monotonic() - begin
        if plan.params <= self._params / (between(self.tries)[1] or inf):
            return False
        write(plan, goal, path)
        return True

    def _try(self, budget: int) -> None:
        """Trains a planned student, or continues it; one that diverges, as it would again, keeps nothing."""
        begin, run = time.monotonic(), self._run(len(self.tries) + 1)
        try:
            figures = run.scores()
        except Diverged as error:
            say(f"search: {error}")
            figures = {"exact_match": 0.0, "params": budget, "seconds": time.monotonic() - begin}
        self.teacher = run.teacher_scored()[0]["exact_match"]
        # Image features of this student; another one has others.
        shutil.rmtree(run.folder.cache, ignore_errors=True)
        score, params, kept = figures["exact_match"], figures["params"], self.goal.keep * self.teacher
        self.tries.append(Tried(self._params / params, params, score, figures["seconds"], _reaches(score, kept)))
        self._save()
        say(
            f"search: {count(params)} parameters, {self._params / params:.1f} times fewer, score {score:.3f}"
            f" ({kept:.3f} or more keeps the quality)"
        )

    def _in_time(self) -> bool:
        """Whether another student fits into the time; the first one always does."""
        times = [one.seconds for one in self.tries]
        return not times or self._spent + sum(times) + max(times) <= 60 * self._minutes

    def _lost(self, more: bool) -> str:
        """What to say if no student keeps the quality; more time in this folder is of no use if no size is left."""
        best = max(self.tries, key=lambda one: one.score)
        share = best.score / self.teacher if self.teacher else 0.0
        remedy = f"in another --run, give more --minutes than {self._minutes:g}, more rows or a lower --keep-quality"
        if more:
            again = f"give more --minutes than {self._minutes:g} (the same command continues) or more rows"
            remedy = f"{again}, or a lower --keep-quality in another --run"
        return (
            f"no student keeps {self.goal.keep:.3g} of the teacher's score {self.teacher:.3f}: the best of"
            f" {len(self.tries)} has {best.score:.3f} ({share:.1%}) at {best.ratio:.1f}x; {remedy}"
        )

    def _largest(self) -> float:
        return self._params / pruning.search(self._teacher, total_parameters, 0).price

    def _goal(self, params: int) -> Goal:
        return self.goal._replace(params=params, minutes=self._minutes / PARTS)

    def _recipe(self, number: int) -> Path:
        return self.path / f"{number}.toml"

    def _folder(self, number: int) -> Path:
        return self.path / str(number)

    def _run(self, number: int) -> Run:
        path = self._recipe(number)
        names = [stage.name for stage in load_recipe(path, ()).stages]
        # A student may be cut in the language model alone: changes of a stage are for those that have it.
        every = (None, *names, *map(str, range(len(names))))
        changes = [each for each in self._changes if stage_of(each) in every]
        recipe = load_recipe(path, changes)
        first = self._folder(1) if number > 1 else None  # all students are of one teacher and its rows
        return Run(recipe, self._folder(number), cache=self.path / "cache", watch=self._watch, alike=first)

    def _last_stage(self, number: int) -> str:
        run = self._run(number)
        last = run.recipe.work[-1]
        return str(run.folder.stage(last.number, last.stage.name))

    def _about(self) -> dict[str, Any]:
        stages = [each for each in self._changes if stage_of(each) is not None]
        return {**{key: value for key, value in self.goal._asdict().items() if key != "minutes"}, "stages": stages}

    def _save(self) -> None:
        state = {"teacher": self.teacher, "spent": self._spent, "tuned": self._tuned._asdict()}
        write_book(self._book, {"goal": self._about(), **state, "tries": self.figures()})

    def _recall(self) -> None:
        remedy = f"remove {self.path} and search again"
        state: Mapping[str, Any] = read_book(self._book, remedy)
        about = json.loads(json.dumps(self._about()))
        known = {"stages": about["stages"], **state.get("goal", {})}  # earlier searches recorded no changes of stages
        if known != about:
            raise AntgmmError(f"{self.path} is the search of other options: choose another --run, or remove it")
        try:
            self.teacher, self._spent, self._tuned = state["teacher"], state["spent"], Tuned(**state["tuned"])
            self.tries = [Tried(**one) for one in state["tries"]]
        except (KeyError, TypeError) as error:
            raise AntgmmError(f"{self._book} holds no students: {remedy}") from error


def _reaches(score: float, least: float) -> bool:
    """Whether a score is at least another one, up to the rounding of floating-point numbers."""
    return score >= least - 1e-9


def rounded_below(keep: float, report: Mapping[str, Any]) -> list[str]:
    """Returns a line if the exported files score less than the student has to: they may hold rounded parameters.

    Args:
        keep: share of the teacher's score that the student keeps.
        report: figures of its report, with the scores of the files.
    """
    score, teacher = (report[model]["exact_match"] for model in ("student", "teacher"))
    if _reaches(score, keep * teacher):
        return []
    return [
        f"warning: the exported files score {score:.3f}, less than {keep:.3g} of the teacher's {teacher:.3f}: the"
        " search compares scores before parameters are rounded for the files; search again in another --run with a"
        " higher --keep-quality, or with --set export.dtype=float32"
    ]


def _forget_report(directory: Path) -> None:
    """Removes the figures, pages and pictures of a report; other files of its folder stay."""
    for name in (REPORT, "report.md", "report.html"):
        (directory / name).unlink(missing_ok=True)
    for picture in directory.glob("ads/[0-9][0-9].png"):
        picture.unlink()
    with suppress(OSError):  # there is none, or it holds other files
        (directory / "ads").rmdir()


def _copy(source: Path, target: Path) -> Path:
    """Copies a folder, also over another one; a full disk is the error of the first file."""
    try:
        return Path(shutil.copytree(source, target, dirs_exist_ok=True))
    except shutil.Error as error:  # lists (source, target, reason) of all files
        raise folders.Unwritten(f"{source} cannot be copied to {target.parent}: {error.args[0][0][2]}") from error
