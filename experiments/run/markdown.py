"""Markdown: tables, and texts of strangers that must not become more than text."""

import re
from collections.abc import Iterable, Sequence

from experiments.run.host.console import printable


def inline(text: str) -> str:
    """Returns a name as one line of text, also in a code span or a cell: what could begin markup becomes "_"."""
    return re.sub(r"[`|<>\[\]]", "_", printable(" ".join(text.split())))


def fenced(text: str) -> str:
    """Returns a text as a code block, which the text cannot end."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}text\n{printable(text)}\n{fence}"


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]], *, texts: int = 1) -> str:
    """Formats a table.

    Args:
        head: names of the columns.
        rows: cells.
        texts: number of columns, from the first, that hold texts; the others hold numbers, aligned to the right.

    Returns:
        Lines without a final line break.
    """
    lines = [head, [*["---"] * texts, *["---:"] * (len(head) - texts)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
