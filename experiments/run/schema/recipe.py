"""Reading of recipes from TOML, with overrides and inheritance of top-level tables."""

import copy
import hashlib
import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tomli_w

from antgmm_jax.errors import AntgmmError
from antgmm_jax.io.files import check_regular, check_size
from experiments.run.schema import Recipe, Training, validated

_LARGEST = 1 << 20
"""Bytes of a recipe."""
AnyRecipe = TypeVar("AnyRecipe", Recipe, Training)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe that prunes and distils.

    Args:
      path: a TOML file.
      overrides: `key=value` changes, e.g. `optimizer.batch_size=32` or `stage.blocks.recover_steps=50` (a stage by name
        or number); values as in TOML, where words need no quotes.

    Returns:
      The recipe; each stage has its complete loss and optimizer.

    Raises:
      AntgmmError: the file does not exist, is not TOML, or has unknown, missing or invalid keys.
    """
    return _load(path, overrides, Recipe)


def load_training(path: str | Path, overrides: Sequence[str] = ()) -> Training:
    """Reads a recipe that trains a teacher; arguments and errors as in `load_recipe`."""
    return _load(path, overrides, Training)


def recipe_of(tables: Mapping[str, Any], where: str) -> Recipe:
    """Validates the tables of a recipe that prunes and distils.

    Args:
      tables: tables as in a file; they are not changed.
      where: start of error messages.

    Returns:
      The recipe; each stage has its complete loss and optimizer.

    Raises:
      AntgmmError: unknown, missing or invalid keys.
    """
    raw = copy.deepcopy(dict(tables))
    _inherit(raw)
    return validated(raw, Recipe, where)


def load_any(path: str | Path, overrides: Sequence[str] = ()) -> Recipe | Training:
    """Reads a recipe of either kind; arguments and errors as in `load_recipe`."""
    trains = "phase" in read_toml(path, "recipe")
    return load_training(path, overrides) if trains else load_recipe(path, overrides)


def read_toml(path: str | Path, kind: str) -> dict[str, Any]:
    """Reads a TOML file.

    Args:
      path: the file.
      kind: kind of file for error messages, such as "recipe".

    Returns:
      Its tables.

    Raises:
      AntgmmError: the file does not exist or is not TOML.
    """
    try:
        check_regular(Path(path))
        check_size(Path(path), _LARGEST, "name a recipe")
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise AntgmmError(f"cannot read the {kind} {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # not UTF-8, not TOML, or nested too deeply
        raise AntgmmError(f"{path} is not TOML: {error}") from None


def dump_recipe(recipe: Recipe | Training) -> str:
    """Formats a recipe as canonical TOML with all keys, so that equal recipes give equal text."""
    return tomli_w.dumps(_plain(recipe))


def fingerprint(recipe: Recipe | Training) -> str:
    """Returns a digest of a recipe (16 hexadecimal digits), independent of comments and explicit defaults.

    What its report measures does not count, as in `difference`.
    """
    # Without defaults, so that a new key changes no digest.
    given = recipe.model_dump(mode="json", by_alias=True, exclude_defaults=True, exclude={"report"})
    text = json.dumps(given, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def difference(first: Recipe | Training, second: Recipe | Training) -> str:
    """Returns the first key with different values in two recipes, with both values; "" for equal recipes.

    What their reports measure may differ, as it changes no model.
    """
    one, other = (_flat({**_plain(recipe), "report": {}}) for recipe in (first, second))
    for key in [*one, *other]:
        if one.get(key) != other.get(key):
            return f"{key}: {one.get(key, 'absent')} / {other.get(key, 'absent')}"
    return ""


def as_parent(stage: Path) -> str:
    """Returns the line of a recipe that starts from a finished stage of another run."""
    return f"parent = {json.dumps(str(stage))}"


def _plain(recipe: Recipe | Training) -> dict[str, Any]:
    """A recipe as plain types, without tables that are None."""
    return recipe.model_dump(mode="json", by_alias=True, exclude_none=True)


def _load(path: str | Path, overrides: Sequence[str], schema: type[AnyRecipe]) -> AnyRecipe:
    raw = read_toml(path, "recipe")
    for override in overrides:
        change(raw, override)
    for other, key, command in ((Training, "phase", "train"), (Recipe, "stage", "compress")):
        if schema is not other and key in raw:
            raise AntgmmError(f"{path} has {key}s: it is a recipe for `antgmm {command}`")
    _inherit(raw)
    return validated(raw, schema, str(path))


def change(raw: dict[str, Any], override: str) -> None:
    """Changes a key of a recipe's tables, in place.

    Args:
      raw: tables as in a file.
      override: `key=value`, as in `load_recipe`.

    Raises:
      AntgmmError: the form is wrong, or there is no such stage.
    """
    keys, equals, text = override.partition("=")
    *parents, last = keys.strip().split(".")
    if not equals or not last:
        raise AntgmmError(f"override {override!r} is not of the form key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or brackets of such a depth
        raise AntgmmError(f"override {override[:80]!r} is not TOML: {error}") from None
    node: Any = raw
    for key in parents:
        node = _entry(node, key, override)
    if not isinstance(node, dict):
        raise AntgmmError(f"override {override!r}: {'.'.join(parents)} is not a table; specify a key of a table")
    node[last] = value


def _entry(node: Any, key: str, override: str) -> Any:
    if isinstance(node, dict):
        return node.setdefault(key, {})
    entries = node if isinstance(node, list) else []
    for index, entry in enumerate(entries):
        if key == str(index) or (isinstance(entry, dict) and key == entry.get("name")):
            return entry
    names = [str(entry.get("name")) for entry in entries if isinstance(entry, dict)]
    raise AntgmmError(f"override {override!r}: there is no {key!r}, only {', '.join(names) or 'nothing'}")


def _inherit(raw: dict[str, Any]) -> None:
    """Completes the tables of stages, phases and `evaluate` from the top-level ones."""

    def complete(table: Any, name: str, top: str = "") -> None:
        base = raw.get(top or name)
        if not isinstance(table, dict) or not isinstance(base, dict):
            return
        given = table.get(name, {})
        # Data tables of different kinds have different keys; optimizers have the same.
        if isinstance(given, dict) and (name == "optimizer" or given.get("kind", base.get("kind")) == base.get("kind")):
            table[name] = {**base, **given}

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


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Flattens nested tables to key path -> value."""
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    if not items:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, entry in items:
        flat |= _flat(entry, f"{prefix}.{key}" if prefix else str(key))
    return flat
