"""What a person sees: lines and bars with the time left while a run works, tables and short numbers of what it gave."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

CONSOLE = Console(stderr=True, markup=False, emoji=False)
"""Everything for people goes to standard error; standard output is for figures."""

EVERY = 10.0
"""Seconds between two lines of progress in a log."""


def say(message: str) -> None:
    """One line about what the run does."""
    CONSOLE.print(message, highlight=False, soft_wrap=True)


@contextmanager
def bar(title: str, total: int) -> Iterator[Callable[[int, str], None]]:
    """Progress with the time passed and left: a bar on a terminal, lines in a log.

    A log gets the first and the last line of each piece of work and one every `EVERY` seconds between them, also while
    a program compiles and nothing is counted.

    Args:
        title: what is being done.
        total: units of work.

    Yields:
        update(done, note): units done so far, and a few words such as the loss.
    """
    if not CONSOLE.is_terminal:
        with _Lines(title, total) as lines:
            yield lines.update
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=CONSOLE) as progress:
        task = progress.add_task(title, total=total, note="")
        yield lambda done, note="": progress.update(task, completed=done, note=note)


@contextmanager
def working(title: str) -> Iterator[None]:
    """Says that work is going on of which nothing can be counted, and for how long.

    Args:
        title: what is being done.
    """
    if not CONSOLE.is_terminal:
        with _Lines(title, 0):
            yield
        return
    with Progress(
        SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn(), console=CONSOLE
    ) as p:
        p.add_task(title, total=None)
        yield


class _Lines:
    """Progress as lines of a log, written by the work itself and, while it says nothing, by a thread.

    A total of 0 stands for work that is not counted.
    """

    def __init__(self, title: str, total: int):
        self._title, self._total, self._done, self._note = title, total, 0, ""
        self._begin, self._printed, self._first = time.monotonic(), 0.0, (0.0, 0)
        self._over, self._lock = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> "_Lines":
        self._print()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def update(self, done: int, note: str = "") -> None:
        with self._lock:
            now, last = time.monotonic(), self._done == self._total
            self._done, self._note = done, note
            if not self._first[1]:
                self._first = now, done
            if (done == self._total and not last) or now - self._printed >= EVERY:
                self._print()

    def _tick(self) -> None:
        while not self._over.wait(1):
            with self._lock:
                if time.monotonic() - self._printed >= EVERY:
                    self._print()

    def _print(self) -> None:
        self._printed = now = time.monotonic()
        passed, times = now - self._begin, []
        if passed >= 1:
            times.append(f"{clock(passed)} passed")
        start, before = self._first
        if before < self._done < self._total:  # what compiles before the first unit is done says nothing of the others
            times.append(f"{clock((now - start) * (self._total - self._done) / (self._done - before))} left")
        counted = f"{self._title}: {self._done}/{self._total}" if self._total else self._title
        say(", ".join([counted, *times, *filter(None, [self._note])]))


def clock(seconds: float) -> str:
    """A duration as minutes and seconds, "2:05", or with hours, "1:02:05"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], title: str = "") -> Table:
    """A table for people; all columns but the first to the right.

    Args:
        head: names of the columns.
        rows: cells.
        title: above it.

    Returns:
        The table.
    """
    made = Table(title=title or None, title_justify="left")
    for place, name in enumerate(head):
        made.add_column(name, justify="right" if place else "left", overflow="fold")
    for row in rows:
        made.add_row(*map(str, row))
    return made


def count(number: float) -> str:
    """A large number with its unit, three digits."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.3g}"
