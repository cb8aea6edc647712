"""Console output: messages, progress bars with the time left, tables and numbers."""

import re
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

from antgmm_jax.parallel import preemption

CONSOLE = Console(stderr=True, markup=False, emoji=False)
"""Messages and progress go to standard error; standard output is for results."""

EVERY = 10.0
"""Seconds between progress lines in a log."""


_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Characters that command a terminal or turn text around, and halves of characters; not tabs and line breaks."""


def printable(text: str) -> str:
    """Returns a text with its control characters escaped: files of strangers must not command the terminal."""
    return _CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def say(message: str) -> None:
    """Prints a message."""
    CONSOLE.print(printable(message), highlight=False, soft_wrap=True)


@contextmanager
def bar(
    title: str, total: int, done: int = 0, *, safe_point: Callable[[], None] = preemption.leave_alone
) -> Iterator[Callable[[int, str], None]]:
    """Shows progress with elapsed and remaining time: a bar on a terminal, lines in a log.

    A log gets the first and the last line, and one every `EVERY` seconds, also while a program compiles.

    Args:
        title: name of the work.
        total: units of work.
        done: units that an earlier process did.
        safe_point: called by `update`: `preemption.leave` if all processes of a run do the same units.

    Yields:
        update(done, note): sets the number of units done, and a note such as the loss.
    """
    if not CONSOLE.is_terminal:
        with _Lines(title, total, done) as lines:
            yield _then(lines.update, safe_point)
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
        task = progress.add_task(title, total=total, completed=done, note="")
        yield _then(lambda done, note="": progress.update(task, completed=done, note=note), safe_point)


def _then(update: Callable[[int, str], None], safe_point: Callable[[], None]) -> Callable[[int, str], None]:
    def updated(done: int, note: str = "") -> None:
        update(done, note)
        safe_point()

    return updated


@contextmanager
def working(title: str) -> Iterator[None]:
    """Shows work without countable units, with the elapsed time.

    Args:
        title: name of the work.
    """
    if not CONSOLE.is_terminal:
        with _Lines(title, 0, 0):
            yield
        return
    with Progress(
        SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn(), console=CONSOLE
    ) as p:
        p.add_task(title, total=None)
        yield


class _Lines:
    """Progress as lines of a log, printed by `update` and, between calls, by a thread.

    A total of 0 is for work without countable units.
    """

    def __init__(self, title: str, total: int, done: int):
        self._title, self._total, self._done, self._note = title, total, done, ""
        self._begin, self._printed, self._first = time.monotonic(), 0.0, (0.0, done)
        self._before = done
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
            if self._first[1] == self._before:
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
        start, first = self._first
        if self._before < first < self._done < self._total:  # excludes compilation before the first unit
            times.append(f"{clock((now - start) * (self._total - self._done) / (self._done - first))} left")
        counted = f"{self._title}: {self._done}/{self._total}" if self._total else self._title
        say(", ".join([counted, *times, *filter(None, [self._note])]))


def clock(seconds: float) -> str:
    """Formats a duration as "2:05" (minutes and seconds) or "1:02:05" (with hours)."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], title: str = "") -> Table:
    """Creates a table with all columns but the first aligned to the right.

    Args:
        head: names of the columns.
        rows: cells.
        title: title of the table.

    Returns:
        The table.
    """
    result = Table(title=title or None, title_justify="left")
    for place, name in enumerate(head):
        result.add_column(name, justify="right" if place else "left", overflow="fold")
    for row in rows:
        result.add_row(*(printable(str(cell)) for cell in row))
    return result


def count(number: float) -> str:
    """Formats a number with three significant digits and a prefix such as M."""
    number = float(f"{number:.3g}")  # before the choice of the prefix: 999 500 is 1 M
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.3g}"
