"""What a person sees: lines and bars with the time left while a run works, tables and short numbers of what it gave."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

CONSOLE = Console(stderr=True, markup=False, emoji=False)
"""Everything for people goes to standard error; standard output is for figures."""


def say(message: str) -> None:
    """One line about what the run does."""
    CONSOLE.print(message, highlight=False, soft_wrap=True)


@contextmanager
def bar(title: str, total: int) -> Iterator[Callable[[int, str], None]]:
    """A progress bar with time elapsed and left; off a terminal, a line at each tenth.

    Args:
        title: what is being done.
        total: units of work.

    Yields:
        update(done, note): units done so far, and a few words such as the loss.
    """
    if not CONSOLE.is_terminal:
        told = [-1]

        def line(done: int, note: str = "") -> None:
            tenth = 10 * done // max(total, 1)
            if tenth > told[0]:
                told[0] = tenth
                say(f"{title}: {done}/{total} {note}".rstrip())

        yield line
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
