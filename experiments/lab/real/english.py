"""English prose that packages ship: paragraphs of Python's reference for tests, of docstrings for training."""

import ast
import importlib.util
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

TRAINED_ON = ("numpy", "scipy", "jax", "optax")
"""Packages with docstrings to train on."""
LEAST, GIVEN, CONTINUED = 250, 24, 72
"""Characters of a paragraph at least; words of it that are given, and at most that are to be continued."""


def paragraphs(texts: Iterable[str]) -> list[str]:
    """Returns the distinct paragraphs of prose in texts: full sentences, without code, lists and tables.

    Args:
        texts: texts in which empty lines separate paragraphs.

    Returns:
        The paragraphs, each in one line, in their order.
    """
    result: dict[str, None] = {}
    for text in texts:
        for block in text.split("\n\n"):
            line = " ".join(block.split())
            prose = (
                len(line) >= LEAST
                and line.count(" ") > 2 * GIVEN
                and line[0].isalpha()
                and line[0].isupper()
                and line.endswith(".")
            )
            if (
                prose
                and not block.startswith(" ")
                and not any(mark in line for mark in (">>>", "::", "http", "``", "---"))
            ):
                result[line] = None
    return [*result]


def docstrings(package: str) -> Iterator[str]:
    """Yields the docstrings of an installed package, without importing it."""
    spec = importlib.util.find_spec(package)
    assert spec and spec.origin, f"{package} is a dependency of this project"
    for path in sorted(Path(spec.origin).parent.rglob("*.py")):
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                yield ast.get_docstring(node) or ""


def write(directory: Path) -> dict[str, Path]:
    """Writes `train.jsonl` and `test.jsonl`: the beginning of a paragraph as question, the rest as answer.

    Args:
        directory: folder to create.

    Returns:
        split -> file.
    """
    from pydoc_data.topics import topics

    directory.mkdir(parents=True)
    held = paragraphs(topics[name] for name in sorted(topics))
    seen = {*held}
    texts = {
        "train": [line for line in paragraphs(t for name in TRAINED_ON for t in docstrings(name)) if line not in seen],
        "test": held,
    }
    for split, lines in texts.items():
        with (directory / f"{split}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(_row(line)) + "\n" for line in lines)
    return {split: directory / f"{split}.jsonl" for split in texts}


def _row(line: str) -> dict[str, str | list]:
    words = line.split()
    return {"images": [], "question": " ".join(words[:GIVEN]), "answer": " ".join(words[GIVEN : GIVEN + CONTINUED])}
