"""What a file says is checked against a schema; all that is wrong in it is told in one line."""

import difflib
import json
from collections.abc import Mapping
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.dataclasses import is_pydantic_dataclass
from pydantic.fields import FieldInfo

from antgmm_jax.errors import AntgmmError

Schema = TypeVar("Schema", bound=BaseModel)


def validated(raw: Mapping[str, Any], schema: type[Schema], where: str) -> Schema:
    """Tables as a schema has them.

    Args:
        raw: the tables, as TOML or JSON holds them.
        schema: what they must be.
        where: begins the error: the file's name.

    Returns:
        The checked table.

    Raises:
        AntgmmError: the keys that are unknown, missing or wrong.
    """
    try:
        # Strict validation takes an array for a tuple only where it reads JSON.
        return schema.model_validate_json(json.dumps(raw, default=str))
    except ValidationError as error:
        raise AntgmmError(f"{where}: {_faults(error, schema)}") from None


def _faults(error: ValidationError, schema: type[BaseModel]) -> str:
    """Every fault in one line; one of a table at the top is not told again for each table that it is laid under."""
    told: dict[tuple, str] = {}
    for fault in error.errors():
        if fault["type"] == "too_short" and fault["input"]:
            continue  # its entries are told to be wrong, and Pydantic then counts none
        parts, owner = _locate(schema, fault["loc"])
        if (_under(parts), fault["type"]) not in told:
            told[parts, fault["type"]] = _told(fault["type"], parts, owner, fault["input"], fault["msg"])
    return "; ".join(told.values())


def _under(parts: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """The key path at the top of what was laid under a table; () for a key that is at the top itself."""
    if parts[:2] == ("evaluate", "hard"):
        return ("data", *parts[2:])
    return parts[2:] if parts[:1] in (("stage",), ("phase",)) else parts[1:] if parts[:1] == ("evaluate",) else ()


def _told(kind: str, parts: tuple[int | str, ...], owner: Any, value: Any, message: str) -> str:
    where = _written(parts)
    message = message.removeprefix("Value error, ")
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):  # of a model, of a dataclass
        return f"unknown key {where}{_nearest(str(parts[-1]), owner)}"
    if kind == "missing":
        return f"{where} is missing"
    shown = "" if isinstance(value, dict | list) else f" = {json.dumps(value)}"
    return f"{where}{shown}: {message}".removeprefix(": ")


def _written(parts: tuple[int | str, ...]) -> str:
    """A key path as TOML writes it, with the number of a list's entry in brackets."""
    text = ""
    for part in parts:
        bare = isinstance(part, str) and part.replace("_", "").replace("-", "").isalnum()
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if bare else f".{json.dumps(part)}"
    return text.lstrip(".")


def _nearest(key: str, owner: Any) -> str:
    known = [*(fields_of(owner) or {})]
    near = difflib.get_close_matches(key, known, n=1)
    return f", did you mean {near[0]!r}?" if near else f": known here are {', '.join(known)}" if known else ""


def fields_of(schema: Any) -> dict[str, FieldInfo] | None:
    """The fields of a table by the keys of the file; None for what is no table.

    Args:
        schema: an annotation: a Pydantic model or dataclass, or anything else.
    """
    if not isinstance(schema, type) or not (issubclass(schema, BaseModel) or is_pydantic_dataclass(schema)):
        return None
    return {field.alias or name: field for name, field in schema.__pydantic_fields__.items()}


def _locate(schema: type[BaseModel], location: tuple[int | str, ...]) -> tuple[tuple[int | str, ...], Any]:
    """Key path as it stands in the file, and the table that its last part was looked for in.

    Pydantic names the chosen variant of a union among the parts; a recipe does not.
    """
    parts: list[int | str] = []
    owner: Any = None
    here: Any = schema
    for part in location:
        options = get_args(here) if get_origin(here) in (Union, UnionType) else ()
        if options:
            here = next((option for option in options if part in _tags(option)), None)
            continue
        if part == "[key]":  # the fault lies in the key itself
            continue
        parts.append(part)
        if (fields := fields_of(here)) is not None:
            owner = here
            here = fields[str(part)].annotation if str(part) in fields else None
        elif get_origin(here) is tuple:
            here = get_args(here)[0]
        else:
            here = None
    return tuple(parts), owner


def _tags(option: Any) -> tuple[str, ...]:
    fields = fields_of(option)
    return get_args(fields["kind"].annotation) if fields else ()
