"""Tables in Markdown."""

from collections.abc import Iterable, Sequence


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
