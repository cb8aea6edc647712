"""The reference of recipe keys, made from the schema.

`python -m experiments.run.schema.reference > docs/reference/recipes.md` writes it.
"""

import inspect
import re
import textwrap
from collections.abc import Iterator
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from experiments.run.schema import Recipe, Training
from experiments.run.schema.faults import fields_of

HEAD = """# Recipe keys

This page is made from the schema by `python -m experiments.run.schema.reference > docs/reference/recipes.md`.

A recipe is a TOML file. One with `[[stage]]` tables cuts and distils a trained model (`antgmm compress`), one with
`[[phase]]` tables trains a model (`antgmm train`). Tables under a stage, a phase or `[evaluate]` say only what differs
from the table of the same name at the top. `--set KEY=VALUE` changes any key, as in `--set optimizer.batch_size=32` or
`--set stage.image.recover_steps=50`. Paths are relative to the folder that the command is started in. A key without a
default has to be given.
"""
_BOUNDS = {"ge": "from {}", "gt": "above {}", "le": "at most {}", "lt": "below {}"}
_PLAIN = {int: "integer", float: "number", str: "text", bool: "true or false"}


def reference() -> str:
    """The reference of all keys of recipes.

    Returns:
        Markdown.
    """
    shown: set[Any] = set()
    parts = [HEAD]
    for title, schema in (("antgmm compress", Recipe), ("antgmm train", Training)):
        parts.append(f"## `{title}`\n\n{_summary(schema)}\n")
        parts += _sections("", schema, shown)
    return "\n".join(parts)


def _sections(path: str, schema: Any, shown: set[Any]) -> Iterator[str]:
    """The table of a schema's keys, then those of the tables in it that were not shown yet."""
    rows, inner = [], []
    meanings = _meanings(schema)
    for key, field in (fields_of(schema) or {}).items():
        name = next(name for name, own in schema.__pydantic_fields__.items() if own is field)
        rows.append(f"| `{key}` | {_values(field)} | {_default(field)} | {meanings[name]} |")
        inner += [(key, field, table) for table in _tables(field.annotation)]
    yield "\n".join(["| key | values | default | |", "| --- | --- | --- | --- |", *rows, ""])
    for key, field, table in inner:
        if table in shown:
            continue
        shown.add(table)
        here = f"{path}.{key}".lstrip(".")
        brackets = f"[[{here}]]" if get_origin(field.annotation) is tuple else f"[{here}]"
        kinds = get_args((fields_of(table) or {})["kind"].annotation) if len(_tables(field.annotation)) > 1 else ()
        of = f" of kind {' or '.join(f'`{kind!r}`' for kind in kinds)}".replace("'", '"') if kinds else ""
        yield f"### `{brackets}`{of}\n\n{_summary(table)}\n"
        yield from _sections(here, table, shown)


def _tables(annotation: Any) -> list[Any]:
    """The tables that an annotation holds."""
    if fields_of(annotation) is not None:
        return [annotation]
    return [table for inner in get_args(annotation) for table in _tables(inner)]


def _values(field: FieldInfo) -> str:
    bounds = [
        text.format(_written(value))
        for fact in field.metadata
        for name, text in _BOUNDS.items()
        if (value := getattr(fact, name, None)) is not None
    ]
    return " ".join([_kind(field.annotation), *bounds])


def _kind(annotation: Any) -> str:
    inner = get_args(annotation)
    if tables := _tables(annotation):
        return "tables" if get_origin(annotation) is tuple else f"table{'' if len(tables) == 1 else ', by its kind'}"
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{_written(value)}`" for value in inner)
    if get_origin(annotation) is tuple:
        return f"list of {_kind(inner[0])}s"
    if get_origin(annotation) is dict:
        return f"table {_kind(inner[0])} -> {_kind(inner[1])}"
    if get_origin(annotation) in (Union, UnionType):
        return " or ".join(_kind(one) for one in inner)
    return _PLAIN.get(annotation) or _kind(inner[0])


def _default(field: FieldInfo) -> str:
    if field.is_required() or _tables(field.annotation):
        return ""
    return f"`{_written(field.default)}`"


def _written(value: Any) -> str:
    """A value as TOML writes it."""
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, tuple):
        return f"[{', '.join(map(_written, value))}]"
    if isinstance(value, dict):
        inside = ", ".join(f"{_written(key)} = {_written(one)}" for key, one in value.items())
        return f"{{ {inside} }}" if inside else "{}"
    return str(value)


def _summary(schema: Any) -> str:
    return inspect.cleandoc(schema.__doc__).split("\n\nAttributes:")[0].strip()


def _meanings(schema: Any) -> dict[str, str]:
    """What each attribute means, from the docstrings of a class and of those that it extends."""
    found: dict[str, str] = {}
    for owner in reversed(schema.__mro__):
        _, _, block = inspect.cleandoc(owner.__doc__ or "").partition("Attributes:\n")
        lines = textwrap.dedent(block).split("\n\n")[0]
        for names, text in re.findall(r"^([\w, ]+): (.*(?:\n +.*)*)", lines, flags=re.MULTILINE):
            found |= dict.fromkeys(names.split(", "), " ".join(text.replace("|", "\\|").split()))
    return found


if __name__ == "__main__":
    print(reference(), end="")
