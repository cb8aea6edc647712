"""What a person sees while a run works: lines, and bars with the time left."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

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
