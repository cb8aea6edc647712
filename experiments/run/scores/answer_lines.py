"""The answers of an evaluation as a file, one JSON line per row."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from antgmm_jax.errors import AntgmmError
from antgmm_jax.io.files import check_regular
from antgmm_jax.io.folders import new_file
from data.metrics import normal
from data.source import Source

_LONGEST = 1 << 24
"""Characters of a line that is looked at."""


def check_target(path: Path) -> None:
    """Checks that a file for answers is new, or holds answers of an earlier evaluation.

    Args:
        path: the file.

    Raises:
        AntgmmError: it is something else, such as the rows, or cannot be written.
    """
    if path.is_dir():
        raise AntgmmError(f"--answers {path} is a folder: name a file")
    if not path.exists():
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            raise AntgmmError(f"--answers {path}: {folder} is no folder that can be written to: name another file")
        return
    try:
        check_regular(path)
        with path.open(encoding="utf-8") as file:
            first = json.loads(file.readline(_LONGEST))
    except (OSError, ValueError, RecursionError):
        first = None
    if not isinstance(first, dict) or not {"answer", "expected", "correct"} <= first.keys():
        raise AntgmmError(f"--answers {path} exists and holds no answers: name another file")


def write_answers(path: Path, records: Source, answers: Sequence[str], jax: Sequence[str] = ()) -> None:
    """Writes id, question, answer, expected answer and correctness of every row, atomically.

    Args:
        path: file to write; an existing one is replaced.
        records: the records.
        answers: one per record.
        jax: answers in JAX beside those of a server, written as `jax`; empty for none.

    Raises:
        AntgmmError: the file cannot be written.
    """
    with new_file(path) as partial, partial.open("w", encoding="utf-8") as file:
        for row, answer in enumerate(answers):
            record = records.words(row)
            line = {
                "id": record.id,
                "question": record.question,
                "answer": answer,
                "expected": record.answer,
                "correct": normal(answer) == normal(record.answer),
                **({"jax": jax[row]} if jax else {}),
            }
            file.write(json.dumps(line) + "\n")
