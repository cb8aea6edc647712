"""Reads recipes from TOML: defaults laid under, overrides laid over, one line for what is wrong."""

import difflib
import hashlib
import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

import tomli_w
from pydantic import BaseModel, ValidationError

from antgmm_jax.errors import AntgmmError
from experiments.schema import Recipe, Training

AnyRecipe = TypeVar("AnyRecipe", Recipe, Training)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe that cuts and distils.

    Args:
      path: a TOML file.
      overrides: `key=value` over the file, e.g. `optimizer.batch_size=32` or `stage.blocks.recover_steps=50` (a stage
        by its name or number); the value as in TOML, quotes of a plain word may be left out.

    Returns:
      The recipe, each stage with its whole loss and optimizer.

    Raises:
      AntgmmError: no such file, not TOML, or the first keys that are unknown, missing or wrong.
    """
    return _load(path, overrides, Recipe)


def load_training(path: str | Path, overrides: Sequence[str] = ()) -> Training:
    """Reads a recipe that trains a teacher; arguments and errors as in `load_recipe`."""
    return _load(path, overrides, Training)


def read_toml(path: str | Path, kind: str) -> dict[str, Any]:
    """The tables of a TOML file.

    Args:
      path: the file.
      kind: what it is, for the error: "recipe".

    Returns:
      Its content.

    Raises:
      AntgmmError: no such file, or not TOML.
    """
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise AntgmmError(f"cannot read the {kind} {path}: {error.strerror}") from None
    except ValueError as error:  # not UTF-8, or not TOML
        raise AntgmmError(f"{path} is not TOML: {error}") from None


def dump_recipe(recipe: Recipe | Training) -> str:
    """The recipe as canonical TOML: every key spelled out, so that equal recipes give equal text."""
    return tomli_w.dumps(_plain(recipe))


def fingerprint(recipe: Recipe | Training) -> str:
    """16 hexadecimal digits that tell one recipe from another; comments and spelled-out defaults do not count."""
    text = json.dumps(_plain(recipe), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def difference(first: Recipe | Training, second: Recipe | Training) -> str:
    """The first key whose values differ, with both values; "" for equal recipes.

    A run folder of another recipe is refused with it.
    """
    one, other = (_flat(_plain(recipe)) for recipe in (first, second))
    for key in [*one, *other]:
        if one.get(key) != other.get(key):
            return f"{key}: {one.get(key, 'absent')} / {other.get(key, 'absent')}"
    return ""


def _plain(recipe: Recipe | Training) -> dict[str, Any]:
    """A recipe as TOML can hold it; a table that it lacks is absent."""
    return recipe.model_dump(mode="json", by_alias=True, exclude_none=True)


def _load(path: str | Path, overrides: Sequence[str], schema: type[AnyRecipe]) -> AnyRecipe:
    raw = read_toml(path, "recipe")
    for override in overrides:
        _override(raw, override)
    for other, key, command in ((Training, "phase", "train"), (Recipe, "stage", "compress")):
        if schema is not other and key in raw:
            raise AntgmmError(f"{path} has {key}s: it is a recipe for `antgmm {command}`")
    _lay_under(raw)
    try:
        # Strict validation takes an array for a tuple only where it reads JSON.
        return schema.model_validate_json(json.dumps(raw, default=str))
    except ValidationError as error:
        raise AntgmmError(f"{path}: {_faults(error, schema)}") from None


def _override(raw: dict[str, Any], override: str) -> None:
    keys, equals, text = override.partition("=")
    *parents, last = keys.strip().split(".")
    if not equals or not last:
        raise AntgmmError(f"override {override!r} is not of the form key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    node: Any = raw
    for key in parents:
        node = _entry(node, key, override)
    if not isinstance(node, dict):
        raise AntgmmError(f"override {override!r}: {'.'.join(parents)} is not a table; name one key under a table")
    node[last] = value


def _entry(node: Any, key: str, override: str) -> Any:
    if isinstance(node, dict):
        return node.setdefault(key, {})
    entries = node if isinstance(node, list) else []
    for index, entry in enumerate(entries):
        if key == str(index) or (isinstance(entry, dict) and key == entry.get("name")):
            return entry
    names = [str(entry.get("name")) for entry in entries if isinstance(entry, dict)]
    raise AntgmmError(f"override {override!r}: no {key!r} there; there are {', '.join(names) or 'none'}")


def _lay_under(raw: dict[str, Any]) -> None:
    """Completes the tables of stages, phases and `evaluate` from those at the top."""

    def complete(table: Any, name: str, top: str = "") -> None:
        under = raw.get(top or name)
        if not isinstance(table, dict) or not isinstance(under, dict):
            return
        own = table.get(name, {})
        # Data of another kind shares no key.
        if isinstance(own, dict) and own.get("kind", under.get("kind")) == under.get("kind"):
            table[name] = {**under, **own}

    for stage in _tables(raw.get("stage")):
        complete(stage, "loss")
        complete(stage, "optimizer")
    for phase in _tables(raw.get("phase")):
        complete(phase, "optimizer")
    complete(raw.get("evaluate"), "data")
    if "hard" in _table(raw.get("evaluate")):
        complete(raw["evaluate"], "hard", "data")


def _table(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _tables(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _faults(error: ValidationError, schema: type[BaseModel]) -> str:
    """Every fault in one line; one of a table at the top is not told again for each table that it is laid under."""
    told: dict[tuple, str] = {}
    for fault in error.errors():
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
    if kind == "extra_forbidden":
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


def _nearest(key: str, owner: type[BaseModel] | None) -> str:
    known = list(_keys(owner)) if owner else []
    near = difflib.get_close_matches(key, known, n=1)
    return f", did you mean {near[0]!r}?" if near else f": known here are {', '.join(known)}" if known else ""


def _keys(schema: type[BaseModel]) -> Iterator[str]:
    for name, field in schema.model_fields.items():
        yield field.alias or name


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
        if isinstance(here, type) and issubclass(here, BaseModel):
            owner = here
            fields = {field.alias or name: field.annotation for name, field in here.model_fields.items()}
            here = fields.get(str(part))
        elif get_origin(here) is tuple:
            here = get_args(here)[0]
        else:
            here = None
    return tuple(parts), owner


def _tags(option: Any) -> tuple[str, ...]:
    if isinstance(option, type) and issubclass(option, BaseModel):
        return get_args(option.model_fields["kind"].annotation)
    return ()


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested tables as key path -> value."""
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    if not items:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, entry in items:
        flat |= _flat(entry, f"{prefix}.{key}" if prefix else str(key))
    return flat
