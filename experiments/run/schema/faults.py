"""Validation of files against a schema, with all errors in one line."""

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
    """Validates tables against a schema.

    Args:
        raw: tables from a TOML or JSON file.
        schema: the schema.
        where: start of the error message, for example the file name.

    Returns:
        The validated table.

    Raises:
        AntgmmError: lists unknown, missing and invalid keys.
    """
    try:
        # Strict validation accepts lists as tuples only in JSON.
        return schema.model_validate_json(json.dumps(raw, default=str))
    except RecursionError:
        raise AntgmmError(f"{where}: keys are nested too deeply: correct it") from None
    except ValidationError as error:
        raise AntgmmError(f"{where}: {_errors(error, schema)}") from None


def _errors(error: ValidationError, schema: type[BaseModel]) -> str:
    """All errors in one line; errors of a top-level table are not repeated for tables that inherit it."""
    messages: dict[tuple, str] = {}
    for item in error.errors():
        if item["type"] == "too_short" and item["input"]:
            continue  # Pydantic does not count invalid entries, which have errors of their own
        parts, owner = _locate(schema, item["loc"])
        if (_under(parts), item["type"]) not in messages:
            messages[parts, item["type"]] = _message(item["type"], parts, owner, item["input"], item["msg"])
    return "; ".join(messages.values())


def _under(parts: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """The top-level key path that a key inherits from; () for top-level keys."""
    if parts[:2] == ("evaluate", "hard"):
        return ("data", *parts[2:])
    return parts[2:] if parts[:1] in (("stage",), ("phase",)) else parts[1:] if parts[:1] == ("evaluate",) else ()


def _message(kind: str, parts: tuple[int | str, ...], owner: Any, value: Any, message: str) -> str:
    where = _written(parts)
    message = message.removeprefix("Value error, ")
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):  # of a model, of a dataclass
        return f"unknown key {where}{_nearest(str(parts[-1]), owner)}"
    if kind == "missing":
        return f"{where} is missing"
    shown = "" if isinstance(value, dict | list) else f" = {json.dumps(value)}"
    return f"{where}{shown}: {message}".removeprefix(": ")


def _written(parts: tuple[int | str, ...]) -> str:
    """Formats a key path like TOML, with list indices in brackets."""
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
    """Returns the fields of a table by their keys in files; None if `schema` is not a table.

    Args:
        schema: annotation: a Pydantic model or dataclass, or anything else.
    """
    if not isinstance(schema, type) or not (issubclass(schema, BaseModel) or is_pydantic_dataclass(schema)):
        return None
    return {field.alias or name: field for name, field in schema.__pydantic_fields__.items()}


def _locate(schema: type[BaseModel], location: tuple[int | str, ...]) -> tuple[tuple[int | str, ...], Any]:
    """Returns the key path as in the file, and the table of its last part.

    Pydantic's location also contains the chosen variant of a union.
    """
    parts: list[int | str] = []
    owner: Any = None
    here: Any = schema
    for part in location:
        options = get_args(here) if get_origin(here) in (Union, UnionType) else ()
        if options:
            here = next((option for option in options if part in _tags(option)), None)
            continue
        if part == "[key]":  # the error is in the key itself
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
